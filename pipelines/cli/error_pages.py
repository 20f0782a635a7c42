"""Which page of the documentation explains an error: the command line ends its sentence with it.

Only errors that a page helps with have one. The first table goes by an error's class, the second
by the module that raised it. tests/pipelines/cli/test_error_pages.py checks that classes, modules,
pages and headings exist.
"""

from ...data.removal import Needed
from ...schemas.errors import Collapsed, DamagedFile, EngineEnded, InputError, OwnCodeError

OF_CLASS: dict[type[InputError], str] = {
    Collapsed: "docs/training.md#when-a-policy-collapses",
    DamagedFile: "docs/reliability.md#a-local-store",
    EngineEnded: "docs/online-vllm.md#in-process",
    Needed: "docs/quickstart.md#remove-what-is-not-needed",
    OwnCodeError: "docs/your-own.md#code-of-your-own",
}
# By the module, below the package, or a package of it; the longest name counts.
OF_MODULE = {
    "data.remote": "docs/scaling.md#a-store-on-s3",
    "data.sources.columns": "docs/your-own.md#columns",
    "data.sources.own": "docs/your-own.md#code-of-your-own",
    "pipelines.annotators": "docs/annotating.md#an-endpoint",
    "pipelines.paid.spending": "docs/annotating.md#money",
    "pipelines.compare.human_labels": "docs/comparing.md#against-people",
    "pipelines.endpoint": "docs/annotating.md#keys",
    "pipelines.samplers.vllm": "docs/online-vllm.md#in-process",
    "pipelines.samplers.vllm_servers": "docs/online-vllm.md#servers",
    "pipelines.scoring": "docs/scores.md#score-and-train",
    "pipelines.verifiers.rewards": "docs/rewards.md",
}
_PACKAGE = __name__.removesuffix("pipelines.cli.error_pages")


def with_page(error: InputError) -> str:
    """The error's sentence, and the page that explains it if there is one."""
    page = page_of(error)
    return str(error) if page is None else f"{error}; see {page}"


def page_of(error: InputError) -> str | None:
    """The page and heading of an error; None: no page explains it better than its sentence."""
    for kind in type(error).__mro__:
        if kind in OF_CLASS:
            return OF_CLASS[kind]
    name = _raised_in(error)
    while name and name not in OF_MODULE:
        name = name.rpartition(".")[0]
    return OF_MODULE.get(name)


def _raised_in(error: InputError) -> str:
    """The module of the frame that raised an error, below the package; "" for another's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return name.removeprefix(_PACKAGE) if name.startswith(_PACKAGE) else ""

"""Packages of an extra that are not installed, named with the command that installs them.

`trace-opd` and flows.py turn a ModuleNotFoundError into such a sentence; whatever imports a package
of an extra late may call `require` before its work.
"""

import re
from importlib.util import find_spec

from .errors import InputError

# Extras of a user, in the order in which a package of several is looked up; dev, docs and peers are
# for the development of trace-opd.
_EXTRAS = (
    "pipelines",
    "problems",
    "study",
    "lora",
    "8bit",
    "liger",
    "vllm",
    "gguf",
    "trackers",
    "trl",
    "prime-rl",
    "ray",
    "dask",
)
_REQUIREMENT = re.compile(r"""([\w.-]+).*;.*extra == ["']([\w-]+)["']""")


def missing_extra(error: ModuleNotFoundError) -> InputError | None:
    """The sentence about a package of an extra that an import did not find; None: no such package.

    A package of the base installation, or a module of trace_opd, is none.
    """
    package = (error.name or "").partition(".")[0]
    extra = _extra_of(package)
    if extra is None:
        return None
    return InputError(
        f"package {package} is not installed; pip install 'trace-opd[{extra}]' (in a clone: "
        f"pip install -e '.[{extra}]')"
    )


def require(*modules: str) -> None:
    """Raise InputError unless these modules of an extra are installed."""
    for module in modules:
        if find_spec(module) is None:
            raise missing_extra(ModuleNotFoundError(name=module)) or InputError(
                f"package {module} is not installed; install it with pip"
            )


def _extra_of(module: str) -> str | None:
    """The extra that installs a module, by the name of its distribution."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("trace-opd") or []
    except PackageNotFoundError:  # run from its folder, not installed
        lines = []
    found = [match.groups() for line in lines if (match := _REQUIREMENT.match(line))]
    extras = {extra for name, extra in found if _normal(name) == _normal(module)}
    return next((extra for extra in _EXTRAS if extra in extras), None)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""Where problems come from: one module per kind of source, named after the config's `kind`.

Stage problems calls the functions here. Each module has `rows(source, seed)`, `identity(source)`
and, if its rows never end, `ENDLESS` (own.py: `endless(source)`). A row is a dictionary with
problem, answer, answer_kind, solution, steps and source as in table problems, and optionally `row`,
its number in the source. A row that can't be used is a `BadRow`. A module is imported when its
source is first used, so no source needs the packages of another.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from ...schemas.configs import Source
from ...schemas.errors import InputError
from ...schemas.own_code import is_own
from ..row_files import BadRow


def rows(
    source: Source, seed: int, skip: Callable[[BadRow], None] | None = None
) -> Iterator[dict[str, Any]]:
    """The source's problems in its own order; generators are endless and depend on the seed.

    skip: called with each row that can't be used; None: the first of them is raised.

    Raises:
        InputError: no rows, a missing column, an empty cell, an unknown task or preset.
    """
    for row in _module(source).rows(source, seed):
        if not isinstance(row, BadRow):
            yield row
        elif skip is None:
            raise row
        else:
            skip(row)


def is_endless(source: Source) -> bool:
    """Whether `rows` never ends, so the caller must limit it."""
    module = _module(source)
    return module.endless(source) if is_own(source.kind) else getattr(module, "ENDLESS", False)


def identity(source: Source) -> dict[str, Any]:
    """JSON-able data that together with the seed determines the rows.

    It holds content hashes instead of paths, resolved revisions, and versions of packages.

    Raises:
        InputError: the source does not exist.
    """
    return _module(source).identity(source)


def _module(source: Source) -> Any:
    file = "own" if is_own(source.kind) else source.kind.replace("-", "_")
    try:
        return import_module(f".{file}", __package__)
    except ModuleNotFoundError as error:
        raise InputError(
            f"source {source.kind}: package {error.name} is not installed; "
            "pip install 'trace-opd[pipelines,problems]'"
        ) from None

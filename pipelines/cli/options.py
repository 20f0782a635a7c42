"""Options that every command has (--quiet, --verbose) or that several have (--json)."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..terminal import choose_output, only_json

QUIET = "Print errors and results alone: no progress, no warnings."
VERBOSE = "Print log lines from level DEBUG on standard error."
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help=QUIET, hidden=True)]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help=VERBOSE, hidden=True)]


def _begin_json(asked: bool) -> bool:
    if asked:
        only_json()
    return asked


AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document, not tables.", callback=_begin_json),
]


class App(typer.Typer):
    """A typer application whose commands take --quiet and --verbose too, after their names."""

    def command(self, *args: Any, **kwargs: Any) -> Callable[[Callable[..., Any]], Any]:
        register = super().command(*args, **kwargs)
        return lambda function: register(_with_output(function))


def _with_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with two options more, hidden: the application's own help names them."""

    @functools.wraps(function)
    def command(*, quiet: bool, verbose: bool, **values: Any) -> Any:
        choose_output(quiet, verbose)
        return function(**values)

    more = {"quiet": _Quiet, "verbose": _Verbose}
    signature = inspect.signature(function)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in more.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {**function.__annotations__, **more}
    return command

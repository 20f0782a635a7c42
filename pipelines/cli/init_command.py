"""`trace-opd init`: a config for one's own model, data and annotator. commands.py adds it."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ...schemas.errors import InputError
from ...schemas.starter import AnnotatorName, Answers, source_of, starter
from ..terminal import console

_ANNOTATORS = ("self", "openai", "rule")


def init(
    file: Annotated[Path, typer.Argument(dir_okay=False, help="YAML file to write.")] = Path(
        "run.yaml"
    ),
    model: Annotated[
        str | None, typer.Option(help="The policy: a folder, a hub id, micro or smollm2.")
    ] = None,
    problems: Annotated[
        str | None,
        typer.Option(
            help="Training problems: a file or folder, a hub id, a preset of the hub, or "
            "arithmetic, word-problems, champ."
        ),
    ] = None,
    eval_problems: Annotated[
        str | None, typer.Option(help="Held-out problems, named likewise.")
    ] = None,
    annotator: Annotated[
        AnnotatorName | None,
        typer.Option(
            help="self: the policy itself; openai: a model at an endpoint; rule: exact, for "
            "problems with known steps."
        ),
    ] = None,
    annotator_model: Annotated[
        str | None, typer.Option(help="Model of annotator openai, by its name at the endpoint.")
    ] = None,
    annotator_url: Annotated[
        str, typer.Option(help="Endpoint of annotator openai.")
    ] = Answers.annotator_url,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Limit on a response's tokens; default: 2048.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented pipeline config for your own model, data and annotator.

    On a terminal the command asks for what no option gives.
    """
    from ...data.atomic import make_folders, write_atomic, writing

    if file.exists() and not force:
        raise InputError(f"{file}: is there already; name another file, or give --force")
    ask = _Asker()
    policy = ask(model, "--model", "Model (a folder or a hub id)")
    training = _known(ask(problems, "--problems", "Training problems (a file or a hub id)"))
    held_out = _known(ask(eval_problems, "--eval-problems", "Held-out problems, likewise"))
    engine: Any = ask(annotator, "--annotator", f"Annotator ({', '.join(_ANNOTATORS)})", "self")
    if engine not in _ANNOTATORS:
        raise InputError(f"annotator {engine!r}: give one of {', '.join(_ANNOTATORS)}")
    if engine == "openai":
        annotator_model = ask(annotator_model, "--annotator-model", "Model at the endpoint")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("-._") or "run"
    limit = max_new_tokens or Answers.max_new_tokens
    answers = Answers(
        name, policy, training, held_out, engine, annotator_model, annotator_url, limit
    )
    text = starter(answers, str(file))
    with writing(file):
        make_folders(file.resolve().parent)
        write_atomic(file, text.encode())
    console.print(
        f"{file} is written; `trace-opd pipeline {file} --dry-run` checks it",
        soft_wrap=True,
        highlight=False,
    )


class _Asker:
    """Asks on a terminal for what no option gives."""

    def __call__(
        self, given: str | None, option: str, question: str, default: str | None = None
    ) -> str:
        if given is not None:
            return given
        if not sys.stdin.isatty():
            raise InputError(
                f"{option} is missing; give it, or run the command on a terminal, where it asks"
            )
        return typer.prompt(question, default=default)


def _known(problems: str) -> str:
    """The text, checked at once: the next question should not follow a bad answer."""
    source_of(problems)
    return problems

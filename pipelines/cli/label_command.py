"""`trace-opd label`: tasks for Label Studio, and its exports. commands.py adds it; slow imports are
inside.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ...schemas.aliases import require_alias
from ...schemas.errors import InputError
from ..terminal import console
from .options import App
from .store_commands import StoreRoot, open_store

label = App(no_args_is_help=True, help="Let people mark responses in Label Studio.")


@label.command("export")
def export_(
    verdicts: Annotated[str, typer.Argument(help="Verdicts dataset: alias, id or stage/id.")],
    folder: Annotated[Path, typer.Argument(help="Folder for config.xml and tasks.json.")],
    marked_by: Annotated[
        str | None,
        typer.Option("--from", help="Annotations dataset whose marks people see and correct."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of tasks.")] = None,
    seed: Annotated[int, typer.Option(help="Seed by which --limit draws.")] = 0,
    only: Annotated[
        Literal["right", "wrong"] | None, typer.Option(help="Only these responses.")
    ] = None,
    hide_verdict: Annotated[
        bool, typer.Option("--hide-verdict", help="Do not show whether the response is right.")
    ] = False,
    hide_reference: Annotated[
        bool, typer.Option("--hide-reference", help="Show neither answer nor solution.")
    ] = False,
    store: StoreRoot = "store",
) -> None:
    """Write a labelling config and tasks for a project of Label Studio."""
    from ..labelling.export_tasks import CONFIG, TASKS, Choice, export_tasks

    correct = None if only is None else only == "right"
    choice = Choice(limit, seed, correct, hide_verdict, hide_reference)
    tasks = export_tasks(verdicts, folder, open_store(store), choice, marked_by)
    console.print(f"{folder / CONFIG}, {folder / TASKS}: {tasks} tasks", soft_wrap=True)


@label.command("import")
def import_(
    file: Annotated[str, typer.Argument(help="Label Studio's export, JSON or JSON-MIN.")],
    alias: Annotated[
        str,
        typer.Option(
            help="Prefix of the datasets' names; an annotator's name follows it.",
            callback=require_alias,
        ),
    ],
    annotator: Annotated[
        str | None, typer.Option(help="Only this annotator; default: a dataset for each.")
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name", help="An annotator's name, as 1=anna or anna@example.org=anna; repeatable."
        ),
    ] = None,
    store: StoreRoot = "store",
) -> None:
    """Make an annotations dataset of each annotator's marks."""
    from ..labelling.import_marks import import_marks

    pairs = [one.partition("=") for one in names or []]
    if odd := [who for who, sign, given in pairs if not (who and sign and given)]:
        raise InputError(f"--name {odd[0]}: is no pair; write 1=anna")
    given_names = {who: given for who, _, given in pairs}
    made = import_marks(file, open_store(store), alias, annotator, given_names)
    for name, dataset in made.items():
        status = "  ".join(f"{key} {count}" for key, count in dataset.summary["status"].items())
        console.print(f"{name}: {dataset.ref}  {status}", soft_wrap=True, markup=False)
        for why, count in dataset.summary.get("left_out", {}).items():
            console.print(f"  invalid: {count}, {why}", soft_wrap=True, markup=False)

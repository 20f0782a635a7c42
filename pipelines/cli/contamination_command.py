"""`trace-opd contamination`. commands.py adds it; slow imports are inside."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ...schemas.errors import InputError
from ..terminal import console, print_data, say
from .options import AsJson
from .store_commands import StoreRoot, open_store

if TYPE_CHECKING:
    import polars as pl

_LISTED = 20
_CUT = 60  # characters of a problem in the terminal
_SUFFIXES = (".csv", ".parquet")


def contamination(
    training: Annotated[str, typer.Argument(help="Training problems: alias, id or stage/id.")],
    held_out: Annotated[
        list[str], typer.Argument(help="Evaluation problems: alias, id or stage/id.")
    ],
    words: Annotated[
        int, typer.Option(min=2, help="Words in a row that count; shorter problems count whole.")
    ] = 13,
    output: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="File for all pairs, .csv or .parquet."),
    ] = None,
    store: StoreRoot = "store",
    as_json: AsJson = False,
) -> None:
    """List evaluation problems that share runs of words with training problems."""
    if output is not None and output.suffix not in _SUFFIXES:
        raise InputError(f"--output {output}: ends in {output.suffix!r}; give .csv or .parquet")
    opened = open_store(store)
    from ...data.atomic import write_atomic
    from ...schemas.extras import require
    from ...schemas.tables import PROBLEMS

    require("polars")
    import polars as pl

    trained, *others = (opened.get(ref, PROBLEMS) for ref in (training, *held_out))
    figures = Table("dataset", "problems", "shared", "share", box=None)
    listed, data = [], []
    for other in others:
        found, pairs = _compared(trained, other, words)
        cells = (f"{found.problems:,}", f"{found.shared:,}", f"{found.share:.1%}")
        figures.add_row(other.ref, *cells)
        listed.append(pairs)
        counts = {"problems": found.problems, "shared": found.shared, "share": found.share}
        data.append({"dataset": other.ref} | counts | {"common_runs": found.common})
        if found.common:
            say(
                f"{other.ref}: {found.common:,} runs of words are in many training problems and "
                "do not count: the wording of a template"
            )
    pairs = pl.concat(listed)
    if as_json:
        if output is not None:
            write_atomic(output, _encoded(pairs, output.suffix))
        print_data({"training": trained.ref, "held_out": data, "pairs": pairs.to_dicts()})
        return
    console.print(figures)
    if len(pairs):
        console.print(_list(pairs), soft_wrap=True)
    if (more := len(pairs) - _LISTED) > 0:
        console.print(f"and {more:,} pairs more{'' if output else '; --output writes all'}")
    if output is not None:
        content = _encoded(pairs, output.suffix)
        write_atomic(output, content)
        console.print(output, soft_wrap=True, highlight=False)


def _compared(trained: Any, other: Any, words: int) -> "tuple[Any, pl.DataFrame]":
    """The overlap of two datasets, and its pairs with ids and texts."""
    import polars as pl

    from ...schemas.conversation import COLUMN, wording
    from ..choice.contamination import overlap

    own, asked = (dataset.read(["problem_id", "problem", COLUMN]) for dataset in (trained, other))
    found = overlap(wording(own), wording(asked), words)
    rows, training_rows = found.pairs["row"], found.pairs["training_row"]
    columns = {
        "problem_id": pl.Series(asked["problem_id"]).gather(rows),
        "training_id": pl.Series(own["problem_id"]).gather(training_rows),
        "shared_runs": found.pairs["grams"],
        "share": found.pairs["share"],
        "problem": pl.Series(asked["problem"]).gather(rows),
        "training_problem": pl.Series(own["problem"]).gather(training_rows),
    }
    return found, pl.DataFrame(columns).select(pl.lit(other.ref).alias("dataset"), pl.all())


def _list(pairs: "pl.DataFrame") -> Table:
    from rich.text import Text

    table = Table("share", "problem", "training problem", "text", box=None)
    for row in pairs.head(_LISTED).iter_rows(named=True):
        text = " ".join(row["problem"].split())[:_CUT]
        ids = (row["problem_id"], row["training_id"])
        table.add_row(f"{row['share']:.0%}", *ids, Text(text))
    return table


def _encoded(pairs: "pl.DataFrame", suffix: str) -> bytes:
    from io import BytesIO

    held = BytesIO()
    if suffix == ".csv":
        pairs.write_csv(held)
    else:
        pairs.write_parquet(held)
    return held.getvalue()

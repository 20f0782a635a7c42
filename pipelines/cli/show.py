"""Datasets' figures and rollouts in the terminal.

commands.py calls `show_dataset`, `trace-opd show` also `show_rollout`.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pyarrow.compute as pc
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ...data.nearby import absent_dataset
from ...data.row_files import skipped_faults
from ...data.store import MANIFEST, Dataset, Store
from ...schemas.errors import DamagedFile, InputError
from ...schemas.labels import Route
from ...schemas.tables import ANNOTATIONS, ROUTED
from ..terminal import named
from ..viewer.paint import Paint, Piece
from ..viewer.rollout_tables import find_tables, find_vocabulary
from ..viewer.rollout_view import PartView, RolloutView, load_rollouts

# Underlines as well as colours: readers must tell routes apart without seeing colour.
_ROUTE_STYLES = (
    "bold bright_blue underline",
    "bold dark_orange underline2",
    "bold italic medium_purple1 underline",
    "bold italic spring_green3",
    "bold italic bright_cyan underline2",
    "italic deep_pink2 underline",
)
_STYLES = {Paint.PLAIN: "", Paint.MARKED: "underline", Paint.DROPPED: "dim strike"} | {
    Paint(route): _ROUTE_STYLES[(route - 1) % len(_ROUTE_STYLES)] for route in list(Route)[1:]
}
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def show_dataset(dataset: Dataset, console: Console, names: Sequence[str] = ()) -> None:
    """Print a dataset's id, its names, rows and figures, and where its files are.

    Raises:
        DamagedFile: its summary does not fit its stage.
    """
    console.print(f"{dataset.ref}{named(names)}  {dataset.rows} rows", soft_wrap=True)
    try:
        tables = list(_summary_tables(dataset))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(
            f"{dataset.path(MANIFEST)}: its summary does not fit stage {dataset.stage}; remove the "
            "file and run the command that made the dataset again: it continues from the parts"
        ) from error
    for table in tables:
        console.print(table)
    console.print(dataset.glob if dataset.parts else dataset.path(), soft_wrap=True)


def _summary_tables(dataset: Dataset) -> Iterator[Table]:
    summary = dict(dataset.summary)
    parts = summary.pop("per_part", None)
    if dataset.stage == "evaluate":
        yield evaluation_table(summary)
    else:
        yield figures_table(summary)
    if parts:
        table = Table("part", *parts[0], box=None)
        for index, part in enumerate(parts):
            table.add_row(str(index), *(figure(key, value) for key, value in part.items()))
        yield table


def figures_table(figures: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    for key, value in figures.items():
        table.add_row(key, Text(figure(key, value)))
    return table


def figure(key: str, value: Any) -> str:
    """A figure of a summary; an unknown cost shows as unknown, not as none."""
    if "usd" in key:
        from ..paid.spending import dollars

        return dollars(value)
    if key == "skipped":
        return "\n".join(skipped_faults(value))
    if key == "columns":
        return "\n".join(f"{role}: {_column(name)}" for role, name in value.items())
    if key == "left_out":
        return ", ".join(f"{number:,} {why}" for why, number in value.items()) or "none"
    if key == "overlap":
        return "\n".join(
            f"{found['shared']:,} of {found['problems']:,} problems of {ref}"
            for ref, found in value.items()
        )
    if key == "bills":
        return "\n".join(
            f"{label}: " + "; ".join(f"{name} {figure(name, own)}" for name, own in bill.items())
            for label, bill in value.items()
        )
    if key == "grades":
        return "\n".join(
            f"{label}: " + ", ".join(f"{name} {_plain(own)}" for name, own in found.items())
            for label, found in value.items()
        )
    if key == "pool":
        return "\n".join(
            f"from step {one['from_step']}: {one['problems']:,} problems of {one['band']}"
            for one in value
        )
    if key == "requests":
        return ", ".join(f"{number:,} {what}" for what, number in value.items())
    return "–" if value is None else str(value)


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:z.3f}"


def _column(name: Any) -> str:
    """A column; for files of several layouts, a file's column map."""
    return name if isinstance(name, str) else ", ".join(f"{r} {n}" for r, n in name.items())


def reading_notes(dataset: Dataset) -> Iterator[str]:
    """How problems were read from files: the columns, the rows that were skipped, and the wording
    that they share with others."""
    with suppress(LookupError, TypeError, AttributeError):
        for key in ("columns", "skipped", "overlap"):
            if key in dataset.summary:
                yield f"{key}: {figure(key, dataset.summary[key])}".replace("\n", "; ")


def evaluation_table(summary: dict[str, Any]) -> Table:
    """A row per figure, a column per policy, the paired difference last; 95 % intervals. A dash
    where nothing was scored."""
    columns = dict(summary["policies"])
    if "paired_difference" in summary:
        columns["paired difference"] = summary["paired_difference"]
    table = Table("figure", *columns, box=None)
    for figure in (name for name in summary["policies"]["base"] if "@" in name):
        cells = []
        for estimates in columns.values():
            value, interval = estimates[figure]["value"], estimates[figure]["ci95"]
            cells.append(
                "–" if value is None else "{:.1%} ({:.1%} – {:.1%})".format(value, *interval)
            )
        table.add_row(figure, *cells)
    return table


def show_rollout(rollout_id_prefix: str, store: Store, console: Console) -> None:
    """Print a rollout from the newest routed or annotations dataset that holds it.

    Raises:
        InputError: not exactly one rollout has an id with that prefix.
    """
    console.print(_panel(*find_rollout(rollout_id_prefix, store)))


def find_rollout(prefix: str, store: Store) -> tuple[RolloutView, Dataset]:
    """A rollout as it is drawn, and the dataset it is from; see `show_rollout`."""
    dataset, rollout_id = _find(prefix, store)
    tables = find_tables(dataset, store)
    (view,) = load_rollouts(tables, [rollout_id], find_vocabulary(dataset, tables))
    return view, dataset


def _find(prefix: str, store: Store) -> tuple[Dataset, str]:
    if not prefix:
        raise InputError("rollout id is empty; give the first characters of an id")
    held = [dataset for dataset in store.datasets() if dataset.contract in (ROUTED, ANNOTATIONS)]
    for dataset in sorted(held, key=lambda d: d.manifest["finished_at"], reverse=True):
        ids = dataset.read(["rollout_id"])["rollout_id"]
        matches = [str(match) for match in ids.filter(pc.starts_with(ids, prefix)).to_pylist()]
        if len(matches) > 1:
            raise InputError(
                f"rollout {prefix!r} is ambiguous in {dataset.ref} ({', '.join(matches[:3])}); "
                "give more of the id"
            )
        if matches:
            return dataset, matches[0]
    what = "dataset or annotated rollout"
    raise InputError(absent_dataset(store.files, prefix, store.aliases(), what))


def _panel(view: RolloutView, dataset: Dataset) -> Panel:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, value in _facts(view):
        # Text, not a string: rich would parse markup in the problem.
        facts.add_row(name, Text(value))
    return Panel(
        Group(facts, Text(), response_text(view.pieces), Text(), _legend(view)),
        title=Text(f"{view.id} in {dataset.ref}"),
        title_align="left",
    )


def _value(part: PartView) -> str:
    return f"none ({part.status})" if part.value is None else f"{part.value:.3g}"


def _facts(view: RolloutView) -> list[tuple[str, str]]:
    verdict = {True: "right", False: "wrong", None: "unscored"}[view.correct]
    reward = "none" if view.reward is None else f"{view.reward:g}"
    tokens = "unknown" if view.tokens is None else view.tokens
    facts = [
        ("problem", view.problem),
        ("gold answer", view.answer),
        ("answer read", view.parsed if view.parsed is not None else "none"),
        ("reward", f"{reward}, {verdict} ({view.verdict})"),
        *((part.name, _value(part)) for part in view.parts),
        *([("selection", view.selection)] if view.selection else []),
        ("type", view.type or "none"),
        ("annotator", f"{view.annotator} ({view.status})" if view.annotator else "none"),
        ("policy", f"{view.policy}, step {view.step}; {view.finish} after {tokens} tokens"),
    ]
    if view.advantage is not None and view.coverage is not None:
        facts.append(("advantage", f"{view.advantage:+.3f}"))
        facts.append(("coverage", f"{view.coverage:.1%}, {view.dropped} marked tokens dropped"))
    for span in view.spans:
        segments = ", ".join(map(str, span.segments))
        kept = "" if span.kept_tokens is None else f", {span.kept_tokens} tokens kept"
        facts.append((f"{span.kind} {span.rank}", f"segments {segments}{kept}"))
    facts += [(name, text) for name in ("feedback", "grades") if (text := getattr(view, name))]
    if view.reflection:
        facts.append(("reflection", view.reflection))
    if view.error:
        facts.append(("error", view.error))
    return facts


def response_text(pieces: list[Piece]) -> Text:
    """The response with its paint as styles, a superscript number before each segment."""
    text = Text(overflow="fold")
    for piece in pieces:
        if piece.segment is not None:
            text.append(str(piece.segment).translate(_SUPERSCRIPT), style="dim cyan")
        text.append(piece.text, style=_STYLES[piece.paint])
    return text


def _legend(view: RolloutView) -> Text:
    text = Text()
    for paint in sorted({piece.paint for piece in view.pieces}):
        name = "grpo" if paint is Paint.PLAIN else paint.name.lower()
        text.append(name, style=_STYLES[paint]).append("  ")
    if not view.exact:
        text.append("colours are estimated: the tokenizer is not available", style="dim")
    return text

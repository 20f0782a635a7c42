"""One rollout as HTML that a notebook draws: `trace_opd.show` calls `picture`.

The paint and the styles are the page's. A notebook may drop scripts, so there is none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from markupsafe import Markup

from ...data.store import Dataset, Store
from ...schemas.errors import InputError, quoted
from .page import page_template, paint_names, stylesheet
from .paint import Paint, Piece
from .rollout_tables import find_tables, find_vocabulary
from .rollout_view import RolloutView, load_rollouts

_TEMPLATE = page_template(Path(__file__).parent / "web" / "notebook.html.j2")
_RULES = stylesheet(["notebook.css", "rollouts.css", "routes.css.j2"])
# Nested, so that no rule reaches the notebook around the rollout.
_COLOURS = stylesheet(["colours.css"]).replace(":root", ".trace-opd")
_STYLE = Markup(f"{_COLOURS}\n.trace-opd {{\n{_RULES}\n}}")  # noqa: S704 - our own files
_NAMES = paint_names(Paint)
_VERDICTS = {True: ("yes", "✓ right"), False: ("no", "✗ wrong"), None: ("unscored", "· unscored")}


@dataclass(frozen=True)
class RolloutPicture:
    """A rollout as the viewer joins and paints it; a notebook draws it. ref: its dataset."""

    view: RolloutView
    ref: str

    def __repr__(self) -> str:
        word = _VERDICTS[self.view.correct][1][2:]
        return f"RolloutPicture({self.view.id} in {self.ref}, {word})"

    def _repr_html_(self) -> str:
        view = self.view
        return _TEMPLATE.render(
            style=_STYLE,
            view=view,
            ref=self.ref,
            drawn=list(_drawn(view)),
            titles={
                -1: "",
                **{span.rank: f"{span.kind} span {span.rank}: " for span in view.spans},
            },
            verdict=_VERDICTS[view.correct],
            reward="no reward" if view.reward is None else f"reward {view.reward:g}",
            facts=list(_facts(view)),
            legend=[_NAMES[paint] for paint in sorted({p.paint for p in view.pieces} - {0})],
        )


def picture(dataset: Dataset, store: Store, rollout: int | str) -> RolloutPicture:
    """The picture of one rollout; see `trace_opd.show`."""
    tables = find_tables(dataset, store)
    rollout_id = _rollout_id(tables.lead, rollout)
    (view,) = load_rollouts(tables, [rollout_id], find_vocabulary(dataset, tables))
    return RolloutPicture(view, tables.lead.ref)


def _rollout_id(lead: Dataset, rollout: int | str) -> str:
    ids = lead.read(["rollout_id"])["rollout_id"]
    if isinstance(rollout, int):
        if not 0 <= rollout < len(ids):
            raise InputError(
                f"row {rollout} is not in {lead.ref}, which has {len(ids):,} rows; count from 0"
            )
        return str(ids[rollout].as_py())
    found = ids.filter(pc.starts_with(ids, rollout)).to_pylist() if rollout else []
    matches = [str(match) for match in found]
    if len(matches) != 1:
        why = "is not" if not matches else f"is ambiguous ({', '.join(matches[:3])})"
        raise InputError(
            f"rollout {quoted(rollout)} {why} in {lead.ref}; give the first characters of an id "
            "of its column rollout_id, or a row"
        )
    return matches[0]


def _drawn(view: RolloutView) -> Iterator[tuple[str | None, Piece, str]]:
    """(number before it, piece, name of its paint) of each piece of the response.

    The number is a span's rank where the span begins, elsewhere a segment's. The name is empty
    where nothing is marked.
    """
    ranked: set[int] = set()
    for piece in view.pieces:
        slot: Any = None if piece.segment is None else str(piece.segment)
        if piece.span >= 0 and piece.span not in ranked:
            ranked.add(piece.span)
            slot = Markup('<b class="rank">{}</b>').format(piece.span)
        plain = piece.paint is Paint.PLAIN and piece.span < 0
        yield slot, piece, "" if plain else _NAMES[piece.paint]


def _facts(view: RolloutView) -> Iterator[tuple[str, str]]:
    """The known facts next to a response."""
    tokens = "unknown" if view.tokens is None else f"{view.tokens:,}"
    facts = [
        ("advantage", None if view.advantage is None else f"{view.advantage:+.3f}"),
        ("coverage", None if view.coverage is None else f"{view.coverage:.1%}"),
        ("annotator", view.annotator),
        ("annotation", None if view.status == "ok" else view.status),
        ("answer read", view.parsed),
        ("verdict", None if view.verdict == "ok" else view.verdict),
        ("tokens", f"{tokens} ({view.finish})"),
    ]
    yield from ((name, value) for name, value in facts if value)

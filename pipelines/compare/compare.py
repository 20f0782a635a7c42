"""Comparison of annotations datasets of the same rollouts: joined, then counted part by part.

`trace-opd compare` calls `compare_annotations`. Figures are in agreement.py, tables in table.py,
the page and the terminal's output in page.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset, Store
from ...schemas.errors import InputError
from ...schemas.tables import ANNOTATIONS
from ...trace.align import ByteTable
from ..viewer.rollout_tables import find_tables, made_by, policy_vocabulary
from .agreement import COUNTS, Counts, Side, confusion, own_counts, shared_counts
from .marks import (
    KINDS,
    TYPES,
    Marks,
    Units,
    capped_mask,
    character_units,
    marks_of,
    places,
    read_marks,
    token_units,
    unit_mask,
)

SCOPES = (*(kind.value for kind in KINDS), "all")

_BILLS = ("prompt_tokens", "completion_tokens", "cost_usd")
# Counts of rollouts, not of a kind of span.
_OF_ROLLOUTS = ("wrong", "wrong_hit", "right", "right_hit", "unlabelled")


@dataclass(frozen=True)
class Pair:
    """Counts of two annotators.

    sums: (SCOPES, problems, COUNTS) float64, NaN where unknown; types: (SCOPES, TYPES, TYPES), the
    reference's type in rows.
    """

    reference: str
    other: str
    sums: np.ndarray
    types: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Every pair of datasets, the reference first.

    unit: tokens or characters; unit_reason: why not tokens, "" for tokens; common: number of
    rollouts in all datasets; problem_ids: (problems,).
    """

    datasets: dict[str, Dataset]
    unit: str
    unit_reason: str
    common: int
    alpha: float
    problem_ids: list[str]
    pairs: list[Pair]

    @property
    def reference(self) -> str:
        return next(iter(self.datasets))


@dataclass(frozen=True)
class _Joined:
    """Marks of all datasets, and the row of each common rollout in each: (datasets, common)."""

    tables: list[pa.Table]
    rows: np.ndarray

    def first(self, column: str) -> pa.ChunkedArray:
        """A column of the first dataset, for the common rollouts."""
        return self.tables[0][column].take(pa.array(self.rows[0]))

    def take(self, dataset: int, chosen: np.ndarray) -> pa.Table:
        return self.tables[dataset].take(pa.array(self.rows[dataset][chosen]))


# Indices of common rollouts, and their token ids where units are tokens.
Chunk = tuple[np.ndarray, pa.Array | None]


def compare_annotations(
    names: Sequence[str], store: Store, reference: str | None = None, alpha: float = 0.25
) -> Comparison:
    """Count the agreement of every pair of annotations datasets on the rollouts in all of them.

    names: aliases or ids; reference: the dataset that the others are measured against, None: the
    first. In a pair without it, the dataset that is named first is the pair's reference.

    Raises:
        InputError: fewer than two datasets, a dataset without annotations, no rollout in common,
            annotations of different texts.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError("compare: give two or more annotations datasets, each of them once")
    lead = reference or names[0]
    if lead not in names:
        raise InputError(f"--reference {lead}: is none of {', '.join(names)}")
    datasets = {name: store.get(name, ANNOTATIONS) for name in dict.fromkeys([lead, *names])}
    joined = _join([read_marks(dataset) for dataset in datasets.values()], list(datasets))
    rollouts = find_tables(datasets[lead], store).by_role["rollouts"]
    table, reason = _byte_table(rollouts, joined)
    chunks = _chunks(rollouts, joined, with_tokens=table is not None)
    coded = joined.first("problem_id").combine_chunks().dictionary_encode()
    problem_ids: list[Any] = coded.dictionary.to_pylist()
    return Comparison(
        datasets=datasets,
        unit="characters" if table is None else "tokens",
        unit_reason=reason,
        common=joined.rows.shape[1],
        alpha=alpha,
        problem_ids=problem_ids,
        pairs=_count(list(datasets), joined, chunks, table, coded.indices.to_numpy(), alpha),
    )


def _join(tables: list[pa.Table], names: list[str]) -> _Joined:
    ids = tables[0]["rollout_id"]
    rows = np.stack([places(ids, table["rollout_id"]) for table in tables])
    rows = rows[:, (rows >= 0).all(axis=0)]
    if not rows.shape[1]:
        raise InputError(
            f"{', '.join(names)}: have no rollout in common; annotate the same verdicts with each "
            "annotator"
        )
    return _Joined(tables, rows)


def _byte_table(rollouts: Dataset, joined: _Joined) -> tuple[ByteTable | None, str]:
    """The bytes of token ids if they are known for every common rollout; else why not."""
    header = rollouts.read(["rollout_id", "on_policy", "vocab_fingerprint"])
    header = header.filter(pc.is_in(header["rollout_id"], value_set=joined.first("rollout_id")))
    if not pc.all(header["on_policy"]).as_py():
        return None, "some responses have no token ids"
    config = made_by(rollouts)  # empty while the run that sampled is not finished
    known = None
    with suppress(InputError):
        known = policy_vocabulary(config["policy"]) if config else None
    if known is None:
        return None, "the policy's tokenizer is not available"
    if set(pc.unique(header["vocab_fingerprint"]).to_pylist()) != {known.fingerprint}:
        return None, "the token ids are of another vocabulary than the policy's"
    return known.pieces, ""


def _chunks(rollouts: Dataset, joined: _Joined, with_tokens: bool) -> Iterator[Chunk]:
    """The common rollouts part by part; their token ids are most of what a comparison reads."""
    common = places(rollouts.read(["rollout_id"])["rollout_id"], joined.first("rollout_id"))
    start = 0
    for index, part in enumerate(rollouts.manifest["parts"]):
        here = common[start : start + part["rows"]]
        start += part["rows"]
        if (here >= 0).any():
            token_ids = None
            if with_tokens:
                token_ids = rollouts.read_part(index, ["token_ids"])["token_ids"].combine_chunks()
                token_ids = token_ids.filter(pa.array(here >= 0))
            yield here[here >= 0], token_ids


def _count(
    names: list[str],
    joined: _Joined,
    chunks: Iterator[Chunk],
    table: ByteTable | None,
    problem: np.ndarray,
    alpha: float,
) -> list[Pair]:
    """problem: (common,) index of each common rollout's problem."""
    shape = (len(SCOPES), int(problem.max()) + 1, len(COUNTS))
    pairs = [
        Pair(*two, np.zeros(shape), np.zeros((len(SCOPES), len(TYPES), len(TYPES)), np.int64))
        for two in combinations(names, 2)
    ]
    for chosen, token_ids in chunks:
        taken = [joined.take(dataset, chosen) for dataset in range(len(names))]
        sides = dict(zip(names, _sides(taken, token_ids, table, alpha), strict=True))
        for pair in pairs:
            reference, other = sides[pair.reference], sides[pair.other]
            _same_texts(reference.marks, other.marks, taken[0]["rollout_id"], pair)
            _add(pair, reference, other, problem[chosen])
    return pairs


def _sides(
    tables: list[pa.Table], token_ids: pa.Array | None, table: ByteTable | None, alpha: float
) -> Iterator[Side]:
    known: tuple[Marks, Units] | None = None
    for rows in tables:
        marks = marks_of(rows)
        if known is not None and _same_segments(known[0], marks):
            units = known[1]  # aligning tokens takes most of the time
        elif token_ids is not None and table is not None:
            units = token_units(marks, token_ids, table)
        else:
            units = character_units(marks)
        known = known or (marks, units)
        mask = unit_mask(marks, units)
        bills = {name: rows[name].to_numpy().astype(float) for name in _BILLS}
        yield Side(marks, units, mask, capped_mask(marks, units, mask, alpha), bills)


def _same_segments(first: Marks, second: Marks) -> bool:
    return np.array_equal(first.segment_offsets, second.segment_offsets) and np.array_equal(
        first.segment_ends, second.segment_ends
    )


def _same_texts(first: Marks, second: Marks, rollout_ids: pa.ChunkedArray, pair: Pair) -> None:
    differ = np.flatnonzero(first.lengths != second.lengths)
    if len(differ):
        raise InputError(
            f"{pair.reference}, {pair.other}: rollout {rollout_ids[int(differ[0])]} is annotated "
            "with texts of different lengths; annotate again from the same rollouts"
        )


def _add(pair: Pair, reference: Side, other: Side, problem: np.ndarray) -> None:
    """Add a chunk's counts to each scope's sums by problem."""
    first, second = reference.marks, other.marks
    shared = shared_counts(reference, other)
    of_first, of_second = own_counts(reference), own_counts(other)
    # Where one was not asked, the kind that the other was asked for.
    kind = np.where(first.kind >= 0, first.kind, second.kind)
    kind = np.where(shared["asked_differently"], -1, kind)
    for scope, name in enumerate(SCOPES):
        every = name == "all"
        columns = [
            *_masked(shared, every | (kind == scope), () if every else _OF_ROLLOUTS),
            *_masked(of_first, every | (first.kind == scope)),
            *_masked(of_second, every | (second.kind == scope)),
        ]
        np.add.at(pair.sums[scope], problem, np.stack(columns, axis=1))
        pair.types[scope] += confusion(first, second, shared["judged"] & (every | (kind == scope)))


def _masked(
    counts: Counts, rows: np.ndarray | bool, left_out: Sequence[str] = ()
) -> list[np.ndarray]:
    """Counts with 0 outside the given rows, in the order of COUNTS."""
    return [
        np.zeros(len(values)) if name in left_out else np.where(rows, values, 0.0)
        for name, values in counts.items()
    ]

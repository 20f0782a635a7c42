"""Stage problems: a source becomes a problems table, without repeats, every gold answer parsable.

The source is read once per process, when the request is resolved: what is wrong with it shows
before work begins, and parts are slices of the table.
"""

import logging
import math
import random
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...data import sources
from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import ProblemsConfig, VerifyConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind, VerdictStatus
from ...schemas.tables import PROBLEMS
from ..progress import progress_bar
from ..verifiers.pool import Job, VerifierPool
from ..verifiers.reading import gold_parses
from ..verifiers.verdicts import math_matcher
from .base import Plan, Stage

logger = logging.getLogger(__name__)

# An endless source that brings nothing new for so many rows is taken to be exhausted.
_BARREN_ROWS = 10_000


@dataclass(frozen=True)
class Collection:
    """All problems of a request, and how many rows of the source were left out and why."""

    table: pa.Table
    duplicates: int
    unparsable: int


@dataclass(frozen=True)
class _Slices:
    table: pa.Table
    rows_per_part: int

    def __call__(self, part: int) -> pa.Table:
        return self.table.slice(part * self.rows_per_part, self.rows_per_part)

    def close(self) -> None:
        """Holds nothing open."""


def resolve(config: ProblemsConfig, store: Store) -> Plan:
    """Read and check the source, unless the dataset is there already.

    Raises:
        InputError: an endless source without a limit, a source that is not there or holds
            nothing, a gold answer that does not parse.
    """
    if config.limit is None and sources.is_endless(config.source):
        raise InputError(
            f"source {config.source.kind} never ends; set limit to the number of problems to make"
        )
    semantic = config.semantic() | {"source": sources.identity(config.source)}
    if config.drop_unparsable:
        semantic["math-verify"] = math_matcher()
    found = store.begin("problems", semantic, {}, PROBLEMS)
    if isinstance(found, Dataset):
        return Plan(config, {}, semantic, found.parts)
    collection = _collection(config, semantic)
    parts = math.ceil(collection.table.num_rows / config.rows_per_part)
    left_out = {"duplicates": collection.duplicates, "unparsable": collection.unparsable}
    return Plan(config, {}, semantic, parts, left_out)


def open_slices(plan: Plan, draft: Draft) -> _Slices:
    return _Slices(_collection(plan.config, plan.semantic).table, plan.config.rows_per_part)


def summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict[str, Any]:
    figures = {"problems": 0, "with_solution": 0, "with_steps": 0}
    for table in tables:
        figures["problems"] += table.num_rows
        figures["with_solution"] += pc.count(table.column("solution")).as_py()
        figures["with_steps"] += pc.count(table.column("steps")).as_py()
    return figures


STAGE = Stage("problems", ProblemsConfig, PROBLEMS, resolve, open_slices, summarize)


def _collection(config: ProblemsConfig, semantic: dict[str, Any]) -> Collection:
    return _collect(config.model_dump_json(), content_hash(semantic))


@lru_cache(maxsize=2)
def _collect(config_json: str, content: str) -> Collection:
    """Read the source. `content` is there for the key: files may change under one path."""
    config = ProblemsConfig.model_validate_json(config_json)
    kept: list[dict[str, Any]] = []
    seen: set[str] = set()
    duplicates = unparsable = barren = 0
    rows, total = _ordered(config)
    with (
        progress_bar("problems: reading", total, "problems") as advance,
        closing(_Golds()) as golds,
    ):
        for index, row in rows:
            if barren == _BARREN_ROWS and sources.is_endless(config.source):
                raise InputError(
                    f"source {row['source']}: after {len(kept)} problems {barren} rows brought no "
                    "new one whose answer parses; lower limit or widen the source"
                )
            barren += 1
            place = row.pop("row", index)
            problem_id = content_hash([row["source"], row["problem"], row["answer"]])
            if problem_id in seen:
                duplicates += 1
                continue
            seen.add(problem_id)
            if not golds.parses(row["answer"], row["answer_kind"]):
                if not config.drop_unparsable:
                    raise InputError(
                        f"{row['source']}, row {place}: gold answer {row['answer']!r:.200} does not "
                        f"parse as {row['answer_kind']}; mend it, or set drop_unparsable=true to "
                        "leave such problems out"
                    )
                unparsable += 1
                continue
            kept.append({"problem_id": problem_id, "split": config.split} | row)
            barren = 0
            advance()
            if len(kept) == config.limit:
                break
    if not kept:
        raise InputError(
            f"source {config.source.kind}: none of its {unparsable} gold answers parses; mend the "
            "answers or the column map"
        )
    logger.info("problems: %d kept, %d repeated, %d unparsable", len(kept), duplicates, unparsable)
    if config.limit is not None and len(kept) < config.limit:
        logger.warning("problems: limit is %d, the source has %d", config.limit, len(kept))
    return Collection(PROBLEMS.table(kept), duplicates, unparsable)


class _Golds:
    """Reads gold answers; a worker process reads those that strings do not decide."""

    def __init__(self) -> None:
        limits = VerifyConfig()
        self._pool = VerifierPool(1, limits.timeout_s, limits.memory_mib, limits.recycle_every)

    def parses(self, answer: str, kind: AnswerKind) -> bool:
        decided = gold_parses(answer, kind)
        if decided is not None:
            return decided
        (outcome,) = self._pool.judge([Job(answer, answer)])
        return outcome.status is VerdictStatus.OK

    def close(self) -> None:
        self._pool.close()


def _ordered(config: ProblemsConfig) -> tuple[Iterable[tuple[int, dict[str, Any]]], int]:
    """The source's rows, numbered, in the order that the limit cuts; how many will be kept.

    An endless source is in random order already: shuffling changes nothing there.
    """
    rows = enumerate(sources.rows(config.source, config.seed))
    if sources.is_endless(config.source):
        return rows, config.limit or 0
    if config.limit is not None and not config.shuffle:
        return rows, config.limit
    numbered = list(rows)
    if config.shuffle:
        random.Random(config.seed).shuffle(numbered)
    return numbered, min(config.limit or len(numbered), len(numbered))

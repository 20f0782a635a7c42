"""Stage problems: a source becomes a problems table, without repeats, every gold answer parsable.

The registry loads its `STAGE`. The source is read once per process, when the request is resolved:
its faults show before work begins, and parts are slices of the table.
"""

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...data import sources
from ...data.dataset import get_dataset
from ...data.row_files import BadRow, SkippedRows, bad_row
from ...data.sources.columns import shown as shown_columns
from ...data.store import Dataset, Draft, Store, content_hash
from ...data.store_files import StoreFiles
from ...schemas.configs import ProblemsConfig, VerifyConfig, located
from ...schemas.conversation import COLUMN, history_key, wording
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind, VerdictStatus
from ...schemas.tables import PROBLEMS
from ..choice.contamination import Overlap, overlap
from ..progress import progress_bar
from ..verifiers.pool import Job, VerifierPool
from ..verifiers.reading import gold_parses
from ..verifiers.verdicts import math_matcher
from .base import PartMaker, Plan, Stage

logger = logging.getLogger(__name__)

# An endless source counts as exhausted after so many rows without a new problem.
_BARREN_ROWS = 10_000
_LISTED = 20  # pairs of problems with shared wording, in the summary


def _resolve(config: ProblemsConfig, store: Store) -> Plan:
    """Read and check the source, unless the dataset is finished.

    Raises:
        InputError: an endless source without a limit, a missing or empty source, a gold answer that
            does not parse, no dataset of a name in `against`.
    """
    config = located(config)
    named = dict.fromkeys(store.get(ref, PROBLEMS).ref for ref in config.against)
    against = {f"against_{number}": store.get(ref) for number, ref in enumerate(named)}
    if config.limit is None and sources.is_endless(config.source):
        raise InputError(
            f"source {config.source.kind} never ends; set limit to the number of problems to make"
        )
    semantic = config.semantic() | {"source": sources.identity(config.source)}
    semantic.pop("against", None)  # the datasets' ids stand for it
    if config.drop_unparsable or config.on_bad_rows == "skip":
        semantic["math-verify"] = math_matcher()
    found = store.begin("problems", semantic, against, PROBLEMS)
    if isinstance(found, Dataset):
        return Plan(config, against, semantic, found.parts)
    table, figures = _screened(*_request(config, semantic, against))
    parts = math.ceil(table.num_rows / config.rows_per_part)
    columns = semantic["source"].get("columns")
    read = {"columns": _shown(columns)} if columns else {}
    rows = config.rows_per_part
    work = tuple(len(table.slice(part * rows, rows)) for part in range(parts))
    return Plan(config, against, semantic, parts, read | figures, work)


def _request(
    config: ProblemsConfig, semantic: dict[str, Any], against: dict[str, Dataset]
) -> tuple[str, str, tuple[str, ...], StoreFiles | None]:
    """Arguments of `_screened`, which are a key of its cache."""
    refs = tuple(dataset.ref for dataset in against.values())
    files = next((dataset.files for dataset in against.values()), None)
    return config.model_dump_json(), content_hash(semantic), refs, files


def _shown(columns: dict[str, Any]) -> dict[str, Any]:
    """The column map, or that of each file if they differ, without roles that have no column."""
    if "problem" in columns:
        return shown_columns(columns)
    return {name: shown_columns(columns) for name, columns in columns.items()}


@contextmanager
def _open(plan: Plan, draft: Draft) -> Iterator[PartMaker]:
    table, _ = _screened(*_request(plan.config, plan.semantic, plan.inputs))
    rows = plan.config.rows_per_part
    yield lambda part: table.slice(part * rows, rows)


def _summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict[str, Any]:
    figures = {"problems": 0, "with_solution": 0, "with_steps": 0}
    for table in tables:
        figures["problems"] += table.num_rows
        figures["with_solution"] += pc.count(table.column("solution")).as_py()
        figures["with_steps"] += pc.count(table.column("steps")).as_py()
    return figures


STAGE = Stage(
    "problems",
    ProblemsConfig,
    PROBLEMS,
    _resolve,
    _open,
    _summarize,
    ("solution", "steps"),
)


@lru_cache(maxsize=2)
def _screened(
    config_json: str, content: str, against: tuple[str, ...], files: StoreFiles | None
) -> tuple[pa.Table, dict[str, Any]]:
    """`_collect`, without the problems that share wording with others if they are to be dropped.

    against: refs of datasets in `files`.
    """
    table, figures = _collect(config_json, content)
    if not against or files is None:
        return table, figures
    config = ProblemsConfig.model_validate_json(config_json)
    shared: set[int] = set()
    figures = figures | {"overlap": {}}
    for ref in against:
        other = get_dataset(files, ref).read(["problem_id", "problem", COLUMN])
        found = overlap(wording(table), wording(other), config.overlap_words)
        shared |= set(found.training_rows)
        figures["overlap"][ref] = _overlap_figures(found, table, other)
    if shared:
        what = "left out" if config.drop_overlap else "kept"
        logger.warning(
            "problems: %d of %d share %d words in a row, or all of their words, with %s; they are "
            "%s (drop_overlap)",
            len(shared),
            len(table),
            config.overlap_words,
            ", ".join(against),
            what,
        )
    if not config.drop_overlap:
        return table, figures
    kept = [row for row in range(len(table)) if row not in shared]
    if not kept:
        raise InputError(
            f"source {config.source.kind}: all of its {len(table)} problems share wording with "
            f"{', '.join(against)}; take another source or split, or set drop_overlap=false"
        )
    return table.take(kept), figures | {"overlapping": len(shared)}


def _overlap_figures(found: Overlap, table: pa.Table, other: pa.Table) -> dict[str, Any]:
    """For the manifest's summary: numbers, and the pairs that share the most."""
    first = found.pairs.unique("row", keep="first", maintain_order=True).head(_LISTED)
    asked, known = (one["problem_id"].to_pylist() for one in (other, table))
    pairs = [
        [asked[row], known[own], round(share, 3)]
        for row, own, share in first.select("row", "training_row", "share").iter_rows()
    ]
    return {"problems": found.problems, "shared": found.shared, "first": pairs}


@lru_cache(maxsize=2)
def _collect(config_json: str, content: str) -> tuple[pa.Table, dict[str, Any]]:
    """All problems of a request, and which rows of the source were left out, by reason.

    content: part of the cache key, because a file may change under its path.
    """
    config = ProblemsConfig.model_validate_json(config_json)
    kept: list[dict[str, Any]] = []
    seen: set[str] = set()
    counts, barren, skipped = {"duplicates": 0, "unparsable": 0}, 0, SkippedRows()
    rows, total = _ordered(config, skipped.add if config.on_bad_rows == "skip" else None)
    with (
        progress_bar("problems: reading", total, "problems") as progress,
        _gold_parser() as parses,
    ):
        for index, row in rows:
            if barren == _BARREN_ROWS and sources.is_endless(config.source):
                raise InputError(
                    f"source {row['source']}: after {len(kept)} problems {barren} rows brought no "
                    "new one whose answer parses; lower limit or widen the source"
                )
            barren += 1
            place = f"{row['source']}, row {row.pop('row', index)}"
            problem_id = _problem_id(row)
            if problem_id in seen:
                counts["duplicates"] += 1
                continue
            seen.add(problem_id)
            if not parses(row["answer"], row["answer_kind"]):
                bad = _unparsable(row, place)
                if not config.drop_unparsable and config.on_bad_rows == "refuse":
                    raise bad
                counts["unparsable"] += 1
                skipped.add(bad)
                continue
            kept.append({"problem_id": problem_id, "split": config.split} | row)
            barren = 0
            progress.advance()
            if len(kept) == config.limit:
                break
    if not kept:
        raise InputError(
            f"source {config.source.kind}: none of its {skipped.rows} rows can be used "
            f"({skipped.sentence()}); mend them or the column map"
        )
    logger.info("problems: %d kept, %d repeated, %d unparsable", len(kept), *counts.values())
    if skipped.rows:
        logger.info("problems: skipped %s", skipped.sentence())
    if config.limit is not None and len(kept) < config.limit:
        logger.warning("problems: limit is %d, the source has %d", config.limit, len(kept))
    return PROBLEMS.table(kept), counts | ({"skipped": skipped.figures()} if skipped.rows else {})


def _problem_id(row: dict[str, Any]) -> str:
    """Of the content; the turns before count where there are some."""
    history = history_key(row.get("history"))
    content = [row["source"], row["problem"], row["answer"]]
    return content_hash([*content, history] if history else content)


def _unparsable(row: dict[str, Any], place: str) -> BadRow:
    what = f"does not parse as {row['answer_kind']}"
    return bad_row(
        place,
        f"gold answer {what}",
        "mend it, or set drop_unparsable=true to leave such problems out",
        f"gold answer {row['answer']!r:.200} {what}",
    )


@contextmanager
def _gold_parser() -> Iterator[Callable[[str, AnswerKind], bool]]:
    """Whether a gold answer parses; a worker process reads what string comparison cannot decide."""
    limits = VerifyConfig()
    pool = VerifierPool(1, limits.timeout_s, limits.memory_mib, limits.recycle_every)

    def parses(answer: str, kind: AnswerKind) -> bool:
        if (decided := gold_parses(answer, kind)) is not None:
            return decided
        (outcome,) = pool.judge([Job(answer, answer)])
        return outcome.status is VerdictStatus.OK

    with closing(pool):
        yield parses


def _ordered(
    config: ProblemsConfig, skip: Callable[[BadRow], None] | None
) -> tuple[Iterable[tuple[int, dict[str, Any]]], int]:
    """The source's numbered rows, in the order in which the limit cuts, and how many are kept.

    An endless source is in random order already, so it is not shuffled.
    """
    rows = enumerate(sources.rows(config.source, config.seed, skip))
    if sources.is_endless(config.source):
        return rows, config.limit or 0
    if config.limit is not None and not config.shuffle:
        return rows, config.limit
    numbered = list(rows)
    if config.shuffle:
        random.Random(config.seed).shuffle(numbered)
    return numbered, min(config.limit or len(numbered), len(numbered))

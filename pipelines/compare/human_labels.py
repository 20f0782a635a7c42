"""Human labels of steps become ordinary datasets, against which annotators are measured.

    trace-opd import processbench gsm8k.json --alias gsm8k
    trace-opd annotate verdicts=gsm8k-verdicts annotator.engine=… --alias mine
    trace-opd compare gsm8k-human mine

`trace-opd import` calls `import_labels`. The response is the labelled steps, joined; the segments
are those that stage annotate cuts. A wrong step's span is every segment that shares a visible
character with it; a formula that crosses the step's end makes the segment longer than the step.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import filterfalse, islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from ...data.input_files import digest, find_files
from ...data.row_files import BadRow, SkippedRows
from ...data.step_labels import KINDS, LabelledResponse, prm800k, processbench
from ...data.store import Dataset, Draft, Store, content_hash
from ...data.written_tables import KINDS as OWN_TABLES
from ...schemas.config_faults import unknown_name
from ...schemas.configs import SegmentConfig, VerifyConfig
from ...schemas.contract import TableContract
from ...schemas.errors import InputError
from ...schemas.labels import AnnotationStatus, AnswerKind, FinishReason, VerdictStatus
from ...schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from ..annotators.rows import SKIPPED, Identity, Item, Reading, annotation_row, items
from ..stages.base import give_name, make_dataset
from ..verifiers.pool import Job, Outcome, VerifierPool
from ..verifiers.reading import exact_match
from ..verifiers.verdicts import math_matcher

READER_VERSION = 1  # raised when the same file and options make other rows
UNKNOWN_ANSWER = "unknown"  # the gold answer in the annotation prompt where the file has none
HUMAN = Identity("human", "human")

_PROBLEMS_PER_PART = 64
_NO_KEYS = "people labelled errors, not the key steps of right responses"

Skip = Callable[[BadRow], None] | None
Reader = Callable[[str, Counter[str], Skip], Iterator[LabelledResponse]]
LAYOUTS: dict[str, Reader] = {
    "processbench": lambda path, left_out, skip: processbench.labelled_responses(path, skip),
    "prm800k": prm800k.labelled_responses,
}


@dataclass(frozen=True)
class _Row:
    """A response, its ids as in the tables, and its index in its group."""

    labelled: LabelledResponse
    ids: dict[str, str]
    sample_index: int

    @property
    def problem_id(self) -> str:
        return self.ids["problem_id"]


def import_labels(
    layout: str,
    path: str,
    store: Store,
    alias: str,
    limit: int | None = None,
    hide_verdict: bool = False,
    on_bad_rows: str = "refuse",
) -> dict[str, Dataset]:
    """Make problems, rollouts (text only), verdicts and annotations by `human` of a file.

    alias: prefix of the datasets' names; limit: at most this many responses; hide_verdict: record
    every response as wrong, so that annotators search all of them for errors and cannot infer from
    the outcome whether there is one (docs/comparing.md); on_bad_rows: "skip" counts rows that
    can't be used instead of raising. Returns the datasets by alias.

    Raises:
        InputError: an unknown layout, a missing file, a row that does not fit the layout, no label.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {unknown_name(layout, [*LAYOUTS, *OWN_TABLES])}")
    left_out: Counter[str] = Counter()
    skipped = SkippedRows()
    skip = skipped.add if on_bad_rows == "skip" else None
    rows = list(islice(_numbered(LAYOUTS[layout](path, left_out, skip), left_out), limit))
    if not rows:
        why = f" (skipped {skipped.sentence()})" if skipped.rows else ""
        raise InputError(f"{path}: holds no response whose first wrong step is known{why}")
    parts = _by_problem(rows)
    fs, (found,) = find_files(path, KINDS)
    sha256 = digest(fs, found)
    read = {"layout": layout, "sha256": sha256, "limit": limit, "reader": READER_VERSION}
    if skip is not None:  # older ids know no such option
        read["on_bad_rows"] = on_bad_rows
    made: dict[str, Dataset] = {}

    def make(
        stage: str,
        table: TableContract,
        part_table: Callable[[int], pa.Table],
        summary: dict[str, Any],
        inputs: Sequence[str] = (),
        **options: Any,
    ) -> Dataset:
        semantic = {"import": read} | options
        config = {"import": read | {"file": PurePosixPath(path).name}} | options
        target = store.begin(stage, semantic, {name: made[name] for name in inputs}, table, config)

        def complete(draft: Draft) -> Dataset:
            for index in filterfalse(draft.has_sound_part, range(len(parts))):
                draft.write_part(index, part_table(index))
            return draft.finish(len(parts), summary)

        return make_dataset(target, complete)

    distinct = len({row.problem_id for row in rows})
    wrong = sum(row.labelled.first_wrong is not None for row in rows)
    made["problems"] = make(
        "problems",
        PROBLEMS,
        lambda i: _problems(parts[i]),
        {"problems": distinct, "left_out": dict(left_out)}
        | ({"skipped": skipped.figures()} if skipped.rows else {}),
    )
    counts = {"rollouts": len(rows), "off_policy": len(rows)}
    made["rollouts"] = make(
        "rollout", ROLLOUTS, lambda i: _rollouts(parts[i]), counts, ["problems"]
    )
    made["verdicts"] = make(
        "verify",
        VERDICTS,
        lambda i: _verdicts(parts[i], hide_verdict),
        {"hidden": hide_verdict},
        ["rollouts"],
        hide_verdict=hide_verdict,
    )
    judged = list(made.values())
    made["human"] = make(
        "annotate",
        ANNOTATIONS,
        lambda i: _annotations(parts[i], *(dataset.read_part(i) for dataset in judged)),
        {"with_wrong_step": wrong, "without": len(rows) - wrong},
        ["verdicts", "rollouts", "problems"],
        annotator={"engine": "human", "name": HUMAN.name},
    )
    named = {f"{alias}-{role}": dataset for role, dataset in made.items()}
    for name, dataset in named.items():
        give_name(store, name, dataset)
    return named


def _numbered(responses: Iterable[LabelledResponse], left_out: Counter[str]) -> Iterator[_Row]:
    """Responses with their ids; repeated ones are counted in `left_out`."""
    seen: set[str] = set()
    sizes: Counter[str] = Counter()
    for one in responses:
        answer = one.answer or UNKNOWN_ANSWER
        problem_id = content_hash([one.source, one.problem, answer])
        group_id = content_hash([problem_id, one.generator])
        rollout_id = content_hash([group_id, one.response])
        if rollout_id in seen:
            left_out["repeated"] += 1
            continue
        seen.add(rollout_id)
        ids = {"rollout_id": rollout_id, "problem_id": problem_id, "group_id": group_id}
        yield _Row(one, ids, sizes[group_id])
        sizes[group_id] += 1


def _by_problem(rows: Iterable[_Row]) -> list[list[_Row]]:
    """Parts of complete problems, in the order in which the problems appear."""
    problems: dict[str, list[_Row]] = {}
    for row in rows:
        problems.setdefault(row.problem_id, []).append(row)
    groups = list(problems.values())
    return [
        [row for group in groups[start : start + _PROBLEMS_PER_PART] for row in group]
        for start in range(0, len(groups), _PROBLEMS_PER_PART)
    ]


def _problems(part: Iterable[_Row]) -> pa.Table:
    first: dict[str, LabelledResponse] = {}
    for row in part:
        first.setdefault(row.problem_id, row.labelled)
    return PROBLEMS.table(
        {
            "problem_id": problem_id,
            "problem": one.problem,
            "answer": one.answer or UNKNOWN_ANSWER,
            "answer_kind": AnswerKind.MATH,
            "solution": one.solution,
            "steps": None,
            "source": one.source,
            "split": "test",
        }
        for problem_id, one in first.items()
    )


def _rollouts(part: Iterable[_Row]) -> pa.Table:
    """Text alone: neither token ids nor sampling parameters are known."""
    lists = {name: [] for name in ("prompt_token_ids", "token_ids", "logprobs")}
    numbers = dict.fromkeys(("policy_step", "top_k", "max_new_tokens", "seed"), 0)
    texts = dict.fromkeys(("policy_revision", "vocab_fingerprint"), "")
    unknown = lists | numbers | texts | {"temperature": 1.0, "top_p": 1.0, "on_policy": False}
    return ROLLOUTS.table(
        row.ids
        | unknown
        | {
            "sample_index": row.sample_index,
            "response": row.labelled.response,
            "finish_reason": FinishReason.STOP,
            "policy_name": row.labelled.generator,
        }
        for row in part
    )


def _verdicts(part: list[_Row], hidden: bool) -> pa.Table:
    wrong = Outcome(VerdictStatus.OK, False, 0.0)
    outcomes = [wrong] * len(part) if hidden else _outcomes(part)
    return VERDICTS.table(
        row.ids
        | {
            "reward": None if hidden or outcome.correct is None else float(outcome.correct),
            "correct": outcome.correct,
            "parsed_answer": row.labelled.stated,
            "status": outcome.status,
            "verifier": "hidden" if hidden else _judge(row.labelled),
            "seconds": outcome.seconds,
        }
        for row, outcome in zip(part, outcomes, strict=True)
    )


def _judge(one: LabelledResponse) -> str:
    return math_matcher() if one.correct is None else "human"


def _outcomes(part: list[_Row]) -> list[Outcome]:
    """Whether each final answer is right: the file's label, else a comparison of the answers."""
    outcomes: dict[int, Outcome] = {}
    jobs: dict[int, Job] = {}
    for index, row in enumerate(part):
        one = row.labelled
        gold, stated = one.answer or "", one.stated or ""
        correct = exact_match(gold, stated) if one.correct is None else one.correct
        if correct is None:
            jobs[index] = Job(gold, stated)
        else:
            outcomes[index] = Outcome(VerdictStatus.OK, correct, 0.0)
    if jobs:
        limits = VerifyConfig()
        with closing(VerifierPool(limits.workers, limits.timeout_s, limits.memory_mib)) as pool:
            outcomes |= zip(jobs, pool.judge(list(jobs.values())), strict=True)
    return [outcomes[index] for index in range(len(part))]


def _annotations(
    part: list[_Row], problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table
) -> pa.Table:
    work = items(problems, rollouts, verdicts, SegmentConfig())
    return ANNOTATIONS.table(
        # People marked errors, whatever the final answer, so the row is made as for a wrong one.
        annotation_row(replace(item, correct=False), HUMAN, _reading(row.labelled, item))
        | {"correct": item.correct}
        for row, item in zip(part, work, strict=True)
    )


def _reading(one: LabelledResponse, item: Item) -> Reading:
    if item.correct is None:
        return SKIPPED
    if one.first_wrong is not None:
        first, last = one.step_range(one.first_wrong)
        segments = [
            index
            for index, (start, end) in enumerate(item.segments)
            if item.response[max(start, first) : min(end, last)].strip()
        ]
        return Reading(AnnotationStatus.OK, [segments])
    if item.correct:
        return Reading(AnnotationStatus.ABSTAINED, error=_NO_KEYS)
    return Reading(AnnotationStatus.EMPTY)

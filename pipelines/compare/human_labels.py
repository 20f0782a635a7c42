"""Human labels of steps become ordinary datasets: what an annotator is measured against.

    trace-opd import processbench gsm8k.json --alias gsm8k
    trace-opd annotate verdicts=gsm8k-verdicts annotator.engine=… --alias mine
    trace-opd compare gsm8k-human mine

The response is the labelled steps, joined as they were; the segments are those that stage annotate
cuts. A wrong step's span is every segment that shares a visible character with it: one or more
whole segments, and where a formula runs over the step's end the segment that holds them both.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import filterfalse, islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from ...data.foreign_files import digest, find_files
from ...data.labelled import LabelledResponse
from ...data.sources import prm800k, processbench
from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import SegmentConfig, VerifyConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnnotationStatus, AnswerKind, FinishReason, VerdictStatus
from ...schemas.tables import ANNOTATIONS, CONTRACTS, PROBLEMS, ROLLOUTS, VERDICTS
from ..annotators.rows import SKIPPED, Identity, Item, Reading, annotation_row, items
from ..stages.base import make_dataset
from ..verifiers.pool import Job, Outcome, VerifierPool
from ..verifiers.reading import exact_match
from ..verifiers.verdicts import math_matcher

# Raise it when the same file and options make other rows.
READER_VERSION = 1
# What the annotation prompt then gives as the reference's final answer.
UNKNOWN_ANSWER = "unknown"
HUMAN = Identity("human", "human")

_PROBLEMS_PER_PART = 64
_NO_KEYS = "people labelled errors; nobody marked what is key in a right response"

Reader = Callable[[str, Counter[str]], Iterator[LabelledResponse]]
LAYOUTS: dict[str, Reader] = {
    "processbench": lambda path, left_out: processbench.labelled_responses(path),
    "prm800k": prm800k.labelled_responses,
}


@dataclass(frozen=True)
class _Row:
    """A response with its place: ids as in the tables, index in its group."""

    labelled: LabelledResponse
    problem_id: str
    group_id: str
    rollout_id: str
    sample_index: int

    @property
    def ids(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("rollout_id", "problem_id", "group_id")}


def import_labels(
    layout: str,
    path: str,
    store: Store,
    alias: str,
    limit: int | None = None,
    hide_verdict: bool = False,
) -> dict[str, Dataset]:
    """Make problems, rollouts (text only), verdicts and annotations by `human` of a file.

    alias: prefix of the datasets' names; limit: at most this many responses; hide_verdict: record
    every response as wrong, so that annotators look for errors in all of them and the outcome
    gives nothing away (docs/comparing.md). Returns the datasets by alias.

    Raises:
        InputError: an unknown layout, no such file, a row that is not of the layout, no label.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r}: is none of {', '.join(LAYOUTS)}")
    left_out: Counter[str] = Counter()
    rows = list(islice(_numbered(LAYOUTS[layout](path, left_out), left_out), limit))
    if not rows:
        raise InputError(f"{path}: holds no response whose first wrong step is known")
    parts = _by_problem(rows)
    read = {"layout": layout, "sha256": _sha256(path), "limit": limit, "reader": READER_VERSION}

    def make(
        stage: str,
        table: str,
        part_table: Callable[[int], pa.Table],
        summary: dict[str, Any],
        inputs: Mapping[str, Dataset],
        **options: Any,
    ) -> Dataset:
        told = {"import": read | {"file": PurePosixPath(path).name}} | options
        target = store.begin(stage, {"import": read} | options, inputs, CONTRACTS[table], told)

        def complete(draft: Draft) -> Dataset:
            for index in filterfalse(draft.has_sound_part, range(len(parts))):
                draft.write_part(index, part_table(index))
            return draft.finish(len(parts), summary)

        return make_dataset(target, complete)

    problems = make(
        "problems",
        "problems",
        lambda i: _problems(parts[i]),
        {"problems": len({row.problem_id for row in rows}), "left_out": dict(left_out)},
        {},
    )
    rollouts = make(
        "rollout",
        "rollouts",
        lambda i: _rollouts(parts[i]),
        {"rollouts": len(rows), "off_policy": len(rows)},
        {"problems": problems},
    )
    verdicts = make(
        "verify",
        "verdicts",
        lambda i: _verdicts(parts[i], hide_verdict),
        {"hidden": hide_verdict},
        {"rollouts": rollouts},
        hide_verdict=hide_verdict,
    )
    wrong = sum(row.labelled.first_wrong is not None for row in rows)
    human = make(
        "annotate",
        "annotations",
        lambda i: _annotations(
            parts[i], *(dataset.read_part(i) for dataset in (problems, rollouts, verdicts))
        ),
        {"with_wrong_step": wrong, "without": len(rows) - wrong},
        {"verdicts": verdicts, "rollouts": rollouts, "problems": problems},
        annotator={"engine": "human", "name": HUMAN.name},
    )
    made = {"problems": problems, "rollouts": rollouts, "verdicts": verdicts, "human": human}
    named = {f"{alias}-{role}": dataset for role, dataset in made.items()}
    for name, dataset in named.items():
        store.set_alias(name, dataset)
    return named


def _numbered(responses: Iterable[LabelledResponse], left_out: Counter[str]) -> Iterator[_Row]:
    """Responses with their ids; one that came before is counted in `left_out`."""
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
        yield _Row(one, problem_id, group_id, rollout_id, sizes[group_id])
        sizes[group_id] += 1


def _by_problem(rows: Iterable[_Row]) -> list[list[_Row]]:
    """Parts of whole problems, in the order in which the problems appear."""
    problems: dict[str, list[_Row]] = {}
    for row in rows:
        problems.setdefault(row.problem_id, []).append(row)
    of_problem = iter(problems.values())
    parts = []
    while part := [row for rows in islice(of_problem, _PROBLEMS_PER_PART) for row in rows]:
        parts.append(part)
    return parts


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
    return ROLLOUTS.table(
        row.ids
        | {
            "sample_index": row.sample_index,
            "prompt_token_ids": [],
            "token_ids": [],
            "logprobs": [],
            "response": row.labelled.response,
            "finish_reason": FinishReason.STOP,
            "policy_name": row.labelled.generator,
            "policy_revision": "",
            "policy_step": 0,
            "vocab_fingerprint": "",
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "max_new_tokens": 0,
            "seed": 0,
            "on_policy": False,
        }
        for row in part
    )


def _verdicts(part: list[_Row], hidden: bool) -> pa.Table:
    told = [Outcome(VerdictStatus.OK, False, 0.0)] * len(part) if hidden else _outcomes(part)
    return VERDICTS.table(
        row.ids
        | {
            "reward": None if hidden or outcome.correct is None else float(outcome.correct),
            "correct": outcome.correct,
            "parsed_answer": row.labelled.stated,
            "status": outcome.status,
            "verifier": "hidden" if hidden else _verifier(row.labelled),
            "seconds": outcome.seconds,
        }
        for row, outcome in zip(part, told, strict=True)
    )


def _verifier(one: LabelledResponse) -> str:
    return math_matcher() if one.correct is None else "human"


def _outcomes(part: list[_Row]) -> list[Outcome]:
    """Whether each final answer is right: as the file says, else by comparing the answers."""
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
        pool = VerifierPool(limits.workers, limits.timeout_s, limits.memory_mib)
        try:
            outcomes |= zip(jobs, pool.judge(list(jobs.values())), strict=True)
        finally:
            pool.close()
    return [outcomes[index] for index in range(len(part))]


def _annotations(
    part: list[_Row], problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table
) -> pa.Table:
    work = list(items(problems, rollouts, verdicts, SegmentConfig()))
    rows = []
    for row, item in zip(part, work, strict=True):
        # What people marked is an error, whatever the final answer: an item said to be wrong.
        marked = annotation_row(replace(item, correct=False), HUMAN, _reading(row.labelled, item))
        rows.append(marked | {"correct": item.correct})
    return ANNOTATIONS.table(rows)


def _reading(one: LabelledResponse, item: Item) -> Reading:
    if item.correct is None:
        return SKIPPED
    if one.first_wrong is not None:
        return Reading(AnnotationStatus.OK, [_segments_of(one, item)])
    if item.correct:
        return Reading(AnnotationStatus.ABSTAINED, error=_NO_KEYS)
    return Reading(AnnotationStatus.EMPTY)


def _segments_of(one: LabelledResponse, item: Item) -> list[int]:
    """Segments that share a visible character with the first wrong step."""
    first, last = one.step_range(one.first_wrong or 0)
    return [
        index
        for index, (start, end) in enumerate(item.segments)
        if item.response[max(start, first) : min(end, last)].strip()
    ]


def _sha256(path: str) -> str:
    fs, (found,) = find_files(path, "a JSON or JSONL file")
    return digest(fs, found)

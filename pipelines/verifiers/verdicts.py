"""Verdicts: each response's final answer against the gold answer.

`MathVerifier` judges for stage verify, for online training and for evaluations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from ...schemas.configs import VerifyConfig
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind, FinishReason, VerdictStatus
from ...schemas.tables import VERDICTS
from .pool import Job, Outcome, VerifierPool
from .reading import choice_letter, exact_match, final_answer, letter_of

CHOICE_MATCHER = "choice-matcher 2"
TEXT_MATCHER = "text-matcher 1"
JUDGED_COLUMNS = ["rollout_id", "problem_id", "group_id", "response", "finish_reason"]


def math_matcher() -> str:
    """Name and version of what compares mathematics, as recorded in the verdicts.

    The second number rises when notation.py, units.py, math.py, guards.py, reading.py or
    boxed.py say otherwise than before.
    """
    return f"math-verify {version('math-verify')}, guarded 2"


class MathVerifier:
    """Judges rollouts (trace.protocols.Verifier); holds worker processes until closed.

    Rewards: 1 right, 0 wrong. A response without an answer that parses is wrong: a policy must not
    learn to say nothing. gold_unparsed, timeout, oom and error say nothing about the response: no
    reward. A truncated response has reward 0, or none with `truncated="mask"`, even if a right
    answer is boxed somewhere in it: it has no end, that box may be an
    intermediate trial, and rewarding it would teach to answer early and ramble on. The answer found
    is recorded.

    The verdicts' seconds are time in a worker: 0 where strings decide, or where an equal pair was
    judged before.
    """

    def __init__(self, config: VerifyConfig) -> None:
        self._config = config
        self._math = math_matcher()
        self._pool = VerifierPool(
            config.workers, config.timeout_s, config.memory_mib, config.recycle_every
        )

    def verify(self, problems: pa.Table, rollouts: pa.Table) -> pa.Table:
        """One verdicts row per rollout, in order.

        problems: columns problem_id, answer, answer_kind; rollouts: columns rollout_id, problem_id,
        group_id, response, finish_reason.

        Raises:
            InputError: a rollout's problem is not among the problems.
        """
        golds = {
            row["problem_id"]: (row["answer"], AnswerKind(row["answer_kind"]))
            for row in problems.select(["problem_id", "answer", "answer_kind"]).to_pylist()
        }
        readings = []
        for index, row in enumerate(rollouts.select(JUDGED_COLUMNS).to_pylist()):
            if row["problem_id"] not in golds:
                raise InputError(
                    f"rollouts, row {index}: problem {row['problem_id']} is not among the "
                    "problems; "
                    "verify rollouts with the problems that they were sampled for"
                )
            readings.append(self._read(row, *golds[row["problem_id"]]))
        jobs = [reading.verdict for reading in readings if isinstance(reading.verdict, Job)]
        outcomes = iter(self._pool.judge(jobs))
        return VERDICTS.table(
            self._row(
                reading,
                next(outcomes) if isinstance(reading.verdict, Job) else reading.verdict,
            )
            for reading in readings
        )

    def close(self) -> None:
        self._pool.close()

    def _read(self, rollout: dict[str, Any], gold: str, kind: AnswerKind) -> "_Reading":
        """Find the response's answer, and the verdict if it takes no computer algebra."""
        most = self._config.max_answer_chars
        answer, matcher, verdict = _read_answer(rollout["response"], gold, kind, most, self._math)
        if rollout["finish_reason"] == FinishReason.LENGTH:
            verdict = Outcome(VerdictStatus.TRUNCATED, False, 0.0)
        return _Reading(rollout, answer, matcher, verdict)

    def _row(self, reading: "_Reading", outcome: Outcome) -> dict[str, Any]:
        correct = outcome.correct
        if outcome.status == VerdictStatus.TRUNCATED and self._config.truncated == "mask":
            correct = None
        return {
            "rollout_id": reading.rollout["rollout_id"],
            "problem_id": reading.rollout["problem_id"],
            "group_id": reading.rollout["group_id"],
            "reward": None if correct is None else float(correct),
            "correct": correct,
            "parsed_answer": reading.answer,
            "status": outcome.status,
            "verifier": reading.matcher,
            "seconds": outcome.seconds,
        }


class AnswerJudge:
    """Compares final answers as `MathVerifier` does, for parts of a reward: without truncation."""

    def __init__(self, config: VerifyConfig) -> None:
        self._most = config.max_answer_chars
        self._pool = VerifierPool(
            config.workers, config.timeout_s, config.memory_mib, config.recycle_every
        )

    def judge(
        self, items: Sequence[tuple[str, str, AnswerKind]]
    ) -> tuple[list[str | None], list[Outcome]]:
        """The answers that were read, and the outcomes. items: response, gold answer, its kind."""
        readings = [_read_answer(*item, self._most, "") for item in items]
        jobs = [verdict for _, _, verdict in readings if isinstance(verdict, Job)]
        outcomes = iter(self._pool.judge(jobs))
        return [answer for answer, _, _ in readings], [
            next(outcomes) if isinstance(verdict, Job) else verdict for _, _, verdict in readings
        ]

    def close(self) -> None:
        self._pool.close()


@dataclass(frozen=True)
class _Reading:
    """A rollout, the answer read from it, and its verdict or the job that will give it."""

    rollout: dict[str, Any]
    answer: str | None
    matcher: str
    verdict: Outcome | Job


def _read_answer(
    response: str, gold: str, kind: AnswerKind, most_chars: int, math: str
) -> tuple[str | None, str, Outcome | Job]:
    """The response's answer, what compares it, and the verdict or the job that will give it.

    math: name of what compares mathematics.
    """
    if kind == AnswerKind.CHOICE:
        answer = choice_letter(response)
        return answer, CHOICE_MATCHER, _choice_verdict(letter_of(gold), answer)
    answer = final_answer(response)
    if kind == AnswerKind.TEXT:
        status = VerdictStatus.PRED_UNPARSED if answer is None else VerdictStatus.OK
        equal = answer is not None and answer == gold.strip()
        return answer, TEXT_MATCHER, Outcome(status, equal, 0.0)
    if answer is not None and len(answer) > most_chars:
        answer = None
    return answer, math, _math_verdict(gold, answer)


def _choice_verdict(gold: str | None, answer: str | None) -> Outcome:
    if gold is None:
        return Outcome(VerdictStatus.GOLD_UNPARSED, None, 0.0)
    if answer is None:
        return Outcome(VerdictStatus.PRED_UNPARSED, False, 0.0)
    return Outcome(VerdictStatus.OK, gold == answer, 0.0)


def _math_verdict(gold: str, answer: str | None) -> Outcome | Job:
    if answer is None:
        return Outcome(VerdictStatus.PRED_UNPARSED, False, 0.0)
    equal = exact_match(gold, answer)
    return Job(gold, answer) if equal is None else Outcome(VerdictStatus.OK, equal, 0.0)

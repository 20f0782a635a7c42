"""Answers with known verdicts, read and judged as stage verify does.

The data and what it is for: judging/README.md. `make bench-judge` judges all of it and compares
with math-verify; here the sets that are made from golds are a sample.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest

from trace_opd.pipelines.verifiers.verdicts import MathVerifier
from trace_opd.schemas.configs import VerifyConfig
from trace_opd.schemas.labels import AnswerKind
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS

PAIRS = Path(__file__).parents[3] / "benchmarks" / "judging_pairs.py"
SAMPLE = 6
SETS: dict[str, list[Any]] = runpy.run_path(str(PAIRS))["sets"](sample=SAMPLE)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, list[bool]]:
    """Whether each case of each set is rewarded."""
    cases = [case for group in SETS.values() for case in group]
    problems, rollouts = [], []
    for index, case in enumerate(cases):
        name = str(index)
        kind = AnswerKind.CHOICE if case.is_choice else AnswerKind.MATH
        problems.append(
            {
                "problem_id": name, "problem": name, "answer": case.gold, "answer_kind": kind,
                "solution": None, "steps": None, "source": "test", "split": "train",
            }
        )  # fmt: skip
        rollouts.append(
            {
                "rollout_id": name, "problem_id": name, "group_id": name, "sample_index": 0,
                "prompt_token_ids": [], "token_ids": [], "logprobs": [],
                "response": case.response, "finish_reason": "stop", "policy_name": "test",
                "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "",
                "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 10, "seed": 0,
                "on_policy": False,
            }
        )  # fmt: skip
    verifier = MathVerifier(VerifyConfig(workers=2, timeout_s=60))
    try:
        table = verifier.verify(PROBLEMS.table(problems), ROLLOUTS.table(rollouts))
    finally:
        verifier.close()
    rewarded = iter(table["reward"].to_pylist())
    return {name: [next(rewarded) == 1.0 for _ in group] for name, group in SETS.items()}


@pytest.mark.parametrize("name", SETS)
def test_no_wrong_answer_is_rewarded(verdicts: dict[str, list[bool]], name: str):
    judged = zip(SETS[name], verdicts[name], strict=True)
    assert [case for case, rewarded in judged if rewarded and not case.right] == []


@pytest.mark.parametrize("name", SETS)
def test_right_answers_are_rewarded_except_the_known_misses(
    verdicts: dict[str, list[bool]], name: str
):
    judged = zip(SETS[name], verdicts[name], strict=True)
    refused = [case for case, rewarded in judged if case.right and not rewarded]
    assert refused == [case for case in SETS[name] if case.is_missed]

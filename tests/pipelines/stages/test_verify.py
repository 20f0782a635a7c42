"""Verdicts and their rewards, and the stage over a store."""

from pathlib import Path

import pyarrow as pa
import pytest

from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.stages.verify import STAGE as VERIFY_STAGE
from trace_opd.pipelines.verifiers.verdicts import CHOICE_MATCHER, MathVerifier, math_matcher
from trace_opd.schemas.configs import VerifyConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import AnswerKind
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS

TIMEOUT_S = 3.0


def problem(name: str, answer: str, kind: AnswerKind = AnswerKind.MATH) -> dict:
    return {
        "problem_id": name,
        "problem": f"Problem {name}",
        "answer": answer,
        "answer_kind": kind,
        "solution": None,
        "steps": None,
        "source": "test",
        "split": "train",
    }


def rollout(name: str, problem_id: str, response: str, finish_reason: str = "stop") -> dict:
    return {
        "rollout_id": name,
        "problem_id": problem_id,
        "group_id": f"group-{problem_id}",
        "sample_index": 0,
        "prompt_token_ids": [],
        "token_ids": [],
        "logprobs": [],
        "response": response,
        "finish_reason": finish_reason,
        "policy_name": "test",
        "policy_revision": "0",
        "policy_step": 0,
        "vocab_fingerprint": "",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 10,
        "seed": 0,
        "on_policy": False,
    }


def verdicts(problems: list[dict], rollouts: list[dict], **settings) -> list[dict]:
    verifier = MathVerifier(VerifyConfig(workers=1, **settings))
    table = verifier.verify(PROBLEMS.table(problems), ROLLOUTS.table(rollouts))
    verifier.close()
    return validate(table, VERDICTS).to_pylist()


def test_each_outcome_has_its_reward():
    golds = [
        problem("p", r"\sqrt{2}"),
        problem("c", "C", AnswerKind.CHOICE),
        problem("bad", "}{"),
        problem("no-letter", "12", AnswerKind.CHOICE),
    ]
    rows = verdicts(
        golds,
        [
            rollout("right", "p", r"\boxed{2^{1/2}}"),
            rollout("wrong", "p", r"\boxed{2}"),
            rollout("silent", "p", "I give up."),
            rollout("garbled", "p", r"the answer is }{"),
            rollout("cut", "p", r"\boxed{\sqrt2} but wait", "length"),
            rollout("hostile", "p", r"\boxed{\binom{1000000000}{500000000}}"),
            rollout("letter", "c", "Answer: (C)"),
            rollout("other letter", "c", r"\boxed{A}"),
            rollout("no letter", "c", "All of them."),
            rollout("unknowable", "bad", r"\boxed{5}"),
            rollout("unknowable choice", "no-letter", r"\boxed{C}"),
        ],
        timeout_s=TIMEOUT_S,
    )
    assert {row["rollout_id"]: (row["status"], row["reward"], row["correct"]) for row in rows} == {
        "right": ("ok", 1.0, True),
        "wrong": ("ok", 0.0, False),
        "silent": ("pred_unparsed", 0.0, False),
        "garbled": ("pred_unparsed", 0.0, False),
        "cut": ("truncated", 0.0, False),
        "hostile": ("timeout", None, None),
        "letter": ("ok", 1.0, True),
        "other letter": ("ok", 0.0, False),
        "no letter": ("pred_unparsed", 0.0, False),
        "unknowable": ("gold_unparsed", None, None),
        "unknowable choice": ("gold_unparsed", None, None),
    }
    by_name = {row["rollout_id"]: row for row in rows}
    assert by_name["right"]["verifier"] == math_matcher() == "math-verify 0.9.0, guarded 2"
    assert by_name["letter"]["verifier"] == CHOICE_MATCHER
    assert by_name["cut"]["parsed_answer"] == r"\sqrt2"
    assert by_name["hostile"]["seconds"] >= TIMEOUT_S


def test_truncated_responses_can_be_masked():
    (row,) = verdicts(
        [problem("p", "5")], [rollout("cut", "p", r"\boxed{5}", "length")], truncated="mask"
    )
    assert (row["status"], row["reward"], row["correct"]) == ("truncated", None, None)


def test_an_answer_above_the_length_limit_is_not_parsed():
    (row,) = verdicts(
        [problem("p", "5")], [rollout("long", "p", r"\boxed{05}")], max_answer_chars=1
    )
    assert (row["status"], row["parsed_answer"]) == ("pred_unparsed", None)


def test_answers_that_strings_decide_take_no_worker():
    rows = verdicts(
        [problem("p", "8798")],
        [rollout("a", "p", r"\boxed{8798}"), rollout("b", "p", r"\boxed{8799}")],
    )
    assert [row["correct"] for row in rows] == [True, False]
    assert [row["seconds"] for row in rows] == [0.0, 0.0]


def test_a_rollout_without_its_problem_is_named():
    with pytest.raises(InputError, match="row 1: problem q is not among the problems"):
        verdicts([problem("p", "5")], [rollout("a", "p", "5"), rollout("b", "q", "5")])


# --- the stage -----------------------------------------------------------------------------------


def dataset(store: Store, stage: str, inputs: dict[str, Dataset], parts: list[pa.Table]) -> Dataset:
    draft = store.begin(stage, {"made": "by hand"}, inputs, PROBLEMS if not inputs else ROLLOUTS)
    assert isinstance(draft, Draft)
    for index, part in enumerate(parts):
        draft.write_part(index, part)
    return draft.finish(len(parts))


def two_part_rollouts(store: Store) -> Dataset:
    problems = dataset(
        store,
        "problems",
        {},
        [
            PROBLEMS.table([problem("p0", "1/2")]),
            PROBLEMS.table([problem("p1", "B", AnswerKind.CHOICE), problem("p2", "5")]),
        ],
    )
    return dataset(
        store,
        "rollout",
        {"problems": problems},
        [
            ROLLOUTS.table(
                [rollout("r0", "p0", r"\boxed{2^{-1}}"), rollout("r1", "p0", r"\boxed{2}")]
            ),
            ROLLOUTS.table(
                [
                    rollout("r2", "p2", r"\boxed{5}"),
                    rollout("r3", "p1", "no idea"),
                    rollout("r4", "p2", r"\boxed{5}", "length"),
                ]
            ),
        ],
    )


def test_the_stage_writes_one_verdict_per_rollout_part_by_part(tmp_path: Path):
    store = Store(tmp_path)
    rollouts = two_part_rollouts(store)
    store.set_alias("mine", rollouts)
    made = VERIFY_STAGE.run(VerifyConfig(rollouts="mine", workers=1), store)
    assert [made.read_part(i).column("rollout_id").to_pylist() for i in range(made.parts)] == [
        ["r0", "r1"],
        ["r2", "r3", "r4"],
    ]
    assert made.read().column("reward").to_pylist() == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert made.input("rollouts").ref == rollouts.ref
    summary = dict(made.summary)
    assert summary.pop("mean_seconds") > 0
    assert summary == {
        "statuses": {"ok": 3, "pred_unparsed": 1, "truncated": 1},
        "scored": 5,
        "pass_rate": 0.4,
    }


def test_the_same_request_finds_the_verdicts_by_whatever_name(tmp_path: Path):
    store = Store(tmp_path)
    rollouts = two_part_rollouts(store)
    store.set_alias("mine", rollouts)
    first = VERIFY_STAGE.run(VerifyConfig(rollouts="mine", workers=1), store)
    again = VERIFY_STAGE.run(VerifyConfig(rollouts=rollouts.ref, workers=2), store)
    masked = VERIFY_STAGE.run(VerifyConfig(rollouts="mine", truncated="mask", workers=1), store)
    assert again.manifest == first.manifest
    assert masked.id != first.id
    assert masked.summary["scored"] == 4


def test_problems_are_no_rollouts(tmp_path: Path):
    store = Store(tmp_path)
    rollouts = two_part_rollouts(store)
    with pytest.raises(InputError, match="needs table rollouts"):
        VERIFY_STAGE.run(VerifyConfig(rollouts=rollouts.input("problems").ref), store)

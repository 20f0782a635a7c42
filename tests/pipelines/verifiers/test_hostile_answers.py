"""Hostile final answers at worst end their worker. The stage continues, and the reward is none.

`hostile_answers.jsonl`: gold; the answer as pieces of text with repetition counts; `right`: a
reward of 1 is correct; `slow`: only the deadline ends it, so only `make bench-verify` runs it.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trace_opd.pipelines.verifiers.verdicts import MathVerifier
from trace_opd.schemas.configs import VerifyConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.labels import AnswerKind, VerdictStatus
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS

ROWS = [
    json.loads(line)
    for line in Path(__file__).with_name("hostile_answers.jsonl").read_text().splitlines()
]
TIMEOUT_S, MEMORY_MIB = 1.0, 512
# Time from the deadline until the parent notices, on a busy machine.
LATE_S = 10.0
TRACE = Path("/tmp/hostile-answer")  # noqa: S108 - some answers try to create this file


def problem(name: str, answer: str) -> dict:
    nothing = dict.fromkeys(["solution", "steps"])
    return {
        "problem_id": name, "problem": name, "answer": answer, "answer_kind": AnswerKind.MATH,
        "source": "test", "split": "train",
    } | nothing  # fmt: skip


def rollout(name: str, answer: str) -> dict:
    return {
        "rollout_id": name, "problem_id": name, "group_id": name, "sample_index": 0,
        "prompt_token_ids": [], "token_ids": [], "logprobs": [],
        "response": f"So the answer is \\boxed{{{answer}}}", "finish_reason": "stop",
        "policy_name": "test", "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "",
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 10, "seed": 0,
        "on_policy": False,
    }  # fmt: skip


@contextmanager
def peaks() -> Iterator[dict[int, int]]:
    """The largest address space of each verification worker, in MiB, by process id."""
    found: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                try:
                    if b"verifiers.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        status = Path(f"/proc/{pid}/status").read_text()
                        found[int(pid)] = int(status.partition("VmPeak:")[2].split()[0]) // 1024
                except (OSError, IndexError):  # the process has just ended
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_hostile_answers_get_no_reward_and_stay_within_deadline_and_memory():
    rows = [row for row in ROWS if not row.get("slow")]
    answers = ["".join(text * times for text, times in row["answer"]) for row in rows]
    # Text columns hold no lone surrogates, so such an answer never gets here.
    answers = [answer.encode(errors="replace").decode() for answer in answers]
    config = VerifyConfig(workers=2, timeout_s=TIMEOUT_S, memory_mib=MEMORY_MIB)
    TRACE.unlink(missing_ok=True)
    verifier = MathVerifier(config)
    try:
        with peaks() as found:
            table = verifier.verify(
                PROBLEMS.table([problem(row["name"], row["gold"]) for row in rows]),
                ROLLOUTS.table(
                    [rollout(row["name"], a) for row, a in zip(rows, answers, strict=True)]
                ),
            )
        (after,) = verifier.verify(
            PROBLEMS.table([problem("p", "2x")]), ROLLOUTS.table([rollout("p", "x+x")])
        ).to_pylist()
    finally:
        verifier.close()
    verdicts = validate(table, VERDICTS).to_pylist()
    may_be_right = {row["name"] for row in rows if row.get("right")}
    assert len(rows) >= 300
    assert [verdict["rollout_id"] for verdict in verdicts] == [row["name"] for row in rows]
    assert {v["rollout_id"] for v in verdicts if v["correct"]} <= may_be_right
    assert max(verdict["seconds"] for verdict in verdicts) < TIMEOUT_S + LATE_S
    assert found
    assert max(found.values()) <= MEMORY_MIB
    assert not TRACE.exists()
    # Some rows need the deadline; otherwise it would be untested.
    assert any(verdict["status"] == VerdictStatus.TIMEOUT for verdict in verdicts)
    assert after["correct"] is True

"""A reward of one's own: a fault in it costs one row, or is a sentence before any work."""

import pytest

from trace_opd.pipelines.verifiers.registry import open_verifier
from trace_opd.schemas.configs import OwnReward, VerifyConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import AnswerKind
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS

HOSTILE = """
    import os, time

    def judge(response, metadata, answer):
        if response == "raises":
            return {}["a key"]
        if response == "exits":
            raise SystemExit(3)
        if response == "dies":
            os._exit(7)
        if response == "hangs":
            while True:
                time.sleep(1)
        if response == "hoards":
            return bytes(8 << 30)
        return eval(response)
"""
OK = [
    ("True", 1.0, True, None),
    ("0", 0.0, False, None),
    ("0.5", 0.5, False, None),
    ("{'correct': True}", 1.0, True, None),
    ("{'reward': 0.9, 'correct': True, 'feedback': 'close'}", 0.9, True, "close"),
    ("answer == '7' and metadata['source'] == 'test'", 1.0, True, None),
]
BAD = [
    ("raises", "error"), ("exits", "error"), ("dies", "error"), ("hangs", "timeout"),
    ("hoards", "oom"), ("2.0", "error"), ("float('nan')", "error"), ("None", "error"),
    ("'yes'", "error"), ("{'rewards': 1}", "error"), ("[1, 2]", "error"),
    ("'1'", "error"), ("{'reward': 1, 'correct': 'no'}", "error"),
    ("{'reward': 1, 'feedback': chr(0xd800)}", "error"),
]  # fmt: skip


def rollouts(texts, finish="stop"):
    problem = {"problem_id": "p", "problem": "3+4?", "answer": "7", "answer_kind": "math"}
    problem |= {"solution": None, "steps": None, "source": "test", "split": "train"}
    rows = [
        {
            "rollout_id": str(index), "problem_id": "p", "group_id": "g", "sample_index": index,
            "prompt_token_ids": [], "token_ids": [], "logprobs": [], "response": text,
            "finish_reason": finish, "policy_name": "x", "policy_revision": "0", "policy_step": 0,
            "vocab_fingerprint": "", "temperature": 1.0, "top_p": 1.0, "top_k": 0,
            "max_new_tokens": 9, "seed": 0, "on_policy": False,
        }
        for index, text in enumerate(texts)
    ]  # fmt: skip
    return PROBLEMS.table([problem]), ROLLOUTS.table(rows)


def verdicts(texts, finish="stop", options=None, **settings):
    reward = OwnReward(engine="own.py:judge", options=options or {})
    config = VerifyConfig(reward=reward, timeout_s=1, memory_mib=1024, **settings)
    verifier = open_verifier(config)
    try:
        return verifier.verify(*rollouts(texts, finish)).to_pylist()
    finally:
        verifier.close()


def test_a_hostile_reward_costs_its_own_row_alone(write, caplog):
    write(HOSTILE)
    texts = [text for pair in zip(BAD, OK * 3, strict=False) for text, *_ in pair]
    rows = {row["rollout_id"]: row for row in verdicts(texts)}
    for index, ((_, status), (_, *expected)) in enumerate(zip(BAD, OK * 3, strict=False)):
        bad, good = rows[str(2 * index)], rows[str(2 * index + 1)]
        assert (bad["status"], bad["reward"], bad["correct"]) == (status, None, None)
        assert good["status"] == "ok"
        assert [good["reward"], good["correct"], good["feedback"]] == [
            pytest.approx(expected[0]), *expected[1:]
        ]  # fmt: skip
    assert "own.py, line 6, in judge: KeyError: 'a key'" in caplog.text


def test_a_truncated_response_is_not_shown_to_the_function(write):
    write("def judge(): raise ValueError")
    (zero,) = verdicts(["1"], "length")
    assert (zero["status"], zero["reward"], zero["correct"]) == ("truncated", 0.0, False)
    (masked,) = verdicts(["1"], "length", truncated="mask")
    assert (masked["status"], masked["reward"], masked["correct"]) == ("truncated", None, None)


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("def judge(response, size): pass", {}, "missing a required argument: 'size'"),
        ("def judge(response): pass", {"size": 1}, "unexpected keyword argument 'size'"),
        ("def judge(response): pass", {"answer": 1}, r"options\.answer is an argument"),
        ("class judge: pass", {}, r"has no method __call__"),
        ("judge = 3", {}, "has no class or function judge"),
        ("import os\nif os.environ.get('X') is None:\n    pass\ndef judge(x): pass", {}, "'x'"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused_before_any_work(write, text, options, sentence):
    write(text)
    with pytest.raises(InputError, match=sentence):
        verdicts(["1"], options=options)


def test_a_reward_that_cannot_start_in_its_worker_is_a_sentence(write):
    """It needs more than its address space when it is imported there, or ends the process."""
    write(
        "import os, sys\nif 'pytest' not in sys.modules:\n    os._exit(3)\ndef judge(): return 1\n"
    )
    with pytest.raises(InputError, match=r"ended at its start with exit code 3; .*memory_mib"):
        verdicts(["1"])


def test_a_class_is_built_with_its_options_and_called(write):
    write(
        """
        class judge:
            def __init__(self, options): self.word = options["word"]
            def __call__(self, response): return self.word in response
        """
    )
    rows = verdicts(["a cat", "a dog"], options={"word": "cat"})
    assert [row["reward"] for row in rows] == [1.0, 0.0]


def test_plain_text_answers_are_compared_as_they_are():
    problems, made = rollouts([r"\boxed{a := b}", r"\boxed{a:=b}", "none"])
    row = problems.to_pylist()[0] | {"answer": "a := b", "answer_kind": AnswerKind.TEXT}
    verifier = open_verifier(VerifyConfig())
    found = verifier.verify(PROBLEMS.table([row]), made)
    assert found["correct"].to_pylist() == [True, False, False]
    assert "feedback" not in found.column_names

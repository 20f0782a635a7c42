"""`verify.rewards`: values, their mean, what decides `correct`, what a fault in a part costs."""

import itertools
import json
import os
import re

import pytest
import reasoning_gym

from trace_opd.data import sources
from trace_opd.pipelines.verifiers.registry import open_verifier, verifier_identity
from trace_opd.schemas.configs import GymSource, VerifyConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import PROBLEMS, VERDICTS

from .test_code import _called as called
from .test_code import _wait_until as wait_until
from .test_own_reward import rollouts


def judged(texts, parts, finish="stop", tokens=None, problem=None, **settings):
    problems, made = rollouts(texts, finish)
    if problem is not None:
        problems = PROBLEMS.table([problems.to_pylist()[0] | problem])
    if tokens is not None:
        rows = [
            row | {"token_ids": [1] * count, "logprobs": [-1.0] * count}
            for row, count in zip(made.to_pylist(), tokens, strict=True)
        ]
        made = type(made).from_pylist(rows, schema=made.schema)
    settings = {"timeout_s": 5, "memory_mib": 2048, "workers": 1} | settings
    verifier = open_verifier(VerifyConfig.model_validate({"rewards": parts} | settings))
    try:
        return validate(verifier.verify(problems, made), VERDICTS).to_pylist()
    finally:
        verifier.close()


def values(rows):
    return [[part["value"] for part in row["parts"]] for row in rows]


def test_the_reward_is_the_weighted_mean_and_the_first_part_decides():
    parts = [
        {"name": "math", "weight": 3},
        {"name": "format", "patterns": [r"\\boxed\{", "(?s)^<think>.*</think>"]},
    ]
    right = r"<think>a</think> \boxed{7.0}"
    rows = judged([right, r"\boxed{7}", r"\boxed{8}", "none"], parts)
    assert values(rows) == [[1, 1], [1, 0.5], [0, 0.5], [0, 0]]
    assert [row["reward"] for row in rows] == [1.0, 0.875, 0.125, 0.0]
    assert [row["correct"] for row in rows] == [True, True, False, False]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "pred_unparsed"]
    assert [row["parsed_answer"] for row in rows] == ["7.0", "7", "8", None]
    assert [part["name"] for part in rows[0]["parts"]] == ["math", "format"]


def test_weights_that_floats_cannot_sum_leave_a_full_reward_1():
    parts = [{"name": "exact", "weight": weight} for weight in (0.7, 0.2, 0.1)]
    (row,) = judged([r"\boxed{7}"], parts)
    assert row["reward"] == 1.0
    assert [part["name"] for part in row["parts"]] == ["exact", "exact 2", "exact 3"]


@pytest.mark.parametrize(
    ("part", "text", "value"),
    [
        ({"name": "exact"}, r"so \boxed{7}", 1),
        ({"name": "exact"}, r"so \boxed{7.0}", 0),
        ({"name": "exact", "of": "response"}, " 7\n", 1),
        ({"name": "exact", "of": "response"}, "<think>8</think>7", 1),
        ({"name": "exact", "of": "response"}, "it is 7", 0),
        ({"name": "regex", "pattern": r"\d+"}, "it is 9", 1),
        ({"name": "regex", "pattern": r"\d+"}, "it is none", 0),
        ({"name": "regex", "pattern": r"is (?P<answer>\d+)"}, "it is 7", 1),
        ({"name": "regex", "pattern": r"is (?P<answer>\d+)"}, "it is 9", 0),
        ({"name": "regex", "pattern": r"(?s).*is (?P<answer>\d+)"}, "it is 9, it is\nis 7", 1),
        ({"name": "regex", "pattern": "(a*)*b"}, "a" * 5000, 0),
        ({"name": "length", "limit": 4}, "four", 1),
        ({"name": "length", "limit": 4}, "fives", 0),
        ({"name": "length", "limit": 4, "slack": 4}, "fives", 0.75),
        ({"name": "length", "limit": 4, "slack": 4}, "x" * 9, 0),
        ({"name": "length", "limit": 2}, "🦊é", 1),
        ({"name": "math"}, r"\boxed{\frac{14}{2}}", 1),
        ({"name": "answer"}, r"\boxed{\frac{14}{2}}", 1),
    ],
)
def test_a_part_gives_its_value(part, text, value):
    (row,) = judged([text], [part])
    assert values([row]) == [[value]]
    assert row["reward"] == value


@pytest.mark.parametrize(
    ("part", "problem", "text", "value"),
    [
        ({"name": "choice"}, {"answer": "B", "answer_kind": "choice"}, "Answer: B", 1),
        ({"name": "answer"}, {"answer": "B", "answer_kind": "choice"}, "Answer: C", 0),
        ({"name": "exact", "ignore_case": True}, {"answer": "Paris"}, r"\boxed{PARIS}", 1),
        ({"name": "exact"}, {"answer": "Paris"}, r"\boxed{PARIS}", 0),
    ],
)
def test_a_part_compares_with_the_gold_answer(part, problem, text, value):
    assert values(judged([text], [part], problem=problem)) == [[value]]


def test_a_length_in_tokens_needs_token_ids():
    part = {"name": "length", "limit": 2, "slack": 2, "unit": "tokens"}
    rows = judged(["abc", "abc", "abc", ""], [part], tokens=[2, 3, 0, 0])
    assert values(rows) == [[1], [0.5], [None], [1]]
    assert (rows[2]["status"], rows[2]["reward"], rows[2]["correct"]) == ("error", None, None)


def test_a_part_without_a_value_leaves_the_row_without_reward():
    parts: list[dict] = [{"name": "format"}, {"name": "math"}]
    problem = {"answer": r"\begin{cases"}
    (row,) = judged([r"\boxed{7}"], parts, problem=problem)
    assert (row["reward"], row["correct"], row["status"]) == (None, None, "gold_unparsed")
    assert values([row]) == [[1, None]]
    parts[1]["weight"] = 0  # kept, and asked for nothing
    (row,) = judged([r"\boxed{7}"], parts, problem=problem)
    assert (row["reward"], row["correct"], row["status"]) == (1.0, True, "ok")
    (row,) = judged([r"\boxed{7}"], parts, problem=problem, correct_by="math")
    assert (row["reward"], row["correct"], row["status"]) == (None, None, "gold_unparsed")


def test_a_truncated_response_is_shown_to_no_part(write):
    write("def judge(): raise ValueError")
    parts = [{"name": "own.py:judge"}, {"name": "format"}]
    (zero,) = judged([r"\boxed{7}"], parts, "length")
    assert (zero["status"], zero["reward"], zero["correct"]) == ("truncated", 0.0, False)
    assert zero["parts"] == []
    (masked,) = judged([r"\boxed{7}"], parts, "length", truncated="mask")
    assert (masked["status"], masked["reward"], masked["correct"]) == ("truncated", None, None)


def test_a_threshold_on_one_part_decides_what_is_right(write):
    write("def judge(response): return float(response)")
    parts = [{"name": "format"}, {"name": "own.py:judge"}]
    rows = judged(["0.5", "0.49", "1"], parts, correct_by="own:judge", correct_at=0.5)
    assert [row["correct"] for row in rows] == [True, False, True]
    assert [row["reward"] for row in rows] == pytest.approx([0.25, 0.245, 0.5])
    rows = judged(["0.5", "1"], parts, correct_by=1)
    assert [row["correct"] for row in rows] == [False, True]


def test_what_a_function_says_of_correct_precedes_the_threshold(write):
    write("def judge(response): return {'reward': 0.9, 'correct': response == 'a'}")
    rows = judged(["a", "b"], [{"name": "own.py:judge"}], correct_at=0.5)
    assert [row["correct"] for row in rows] == [True, False]


def test_feedback_of_several_parts_is_joined_under_their_names(write):
    write(
        """
        def one(response): return {"reward": 1, "feedback": "short"}
        def two(response): return {"reward": 1, "feedback": response or None}
        """
    )
    parts = [{"name": "own.py:one"}, {"name": "own.py:two"}]
    rows = judged(["x", ""], parts)
    assert [row["feedback"] for row in rows] == ["own:one: short\nown:two: x", "own:one: short"]
    (alone,) = judged(["x"], parts[1:])
    assert alone["feedback"] == "x"


HOSTILE = """
    import os, signal, sys

    def judge(response, metadata):
        if response == "loops":
            while True:
                pass
        if response == "forks":
            for _ in range(50):
                if os.fork() == 0:
                    os._exit(0)
            return 1
        if response == "eats":
            return len(bytearray(8 << 30))
        if response == "raises":
            raise RuntimeError("odd")
        if response == "prints":
            print("x" * 2**20)
            sys.stderr.write("y" * 2**20)
            return 1
        if response in ("nan", "inf", "-inf"):
            return float(response)
        if response == "text":
            return "1"
        if response == "nothing":
            return {}
        if response == "no reward":
            return {"feedback": "good"}
        if response == "exits":
            sys.exit(0)
        if response == "exits at once":
            os._exit(0)
        if response == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if response == "closes stdout":
            sys.stdout.close()
            os.close(1)
            os.close(2)
            return 1
        if response == "closes all":
            os.closerange(3, 65536)
        if response == "doubles":
            os.fork()
            return 1
        if response == "doubles and raises":
            os.fork()
            raise RuntimeError("odd")
        if response == "nests":
            return judge_again(response)
        return 0.5

    def judge_again(response):
        return judge_again(response)
"""


@pytest.mark.parametrize(
    ("text", "status", "value"),
    [
        ("loops", "timeout", None), ("forks", "ok", 1), ("eats", "oom", None),
        ("raises", "error", None), ("prints", "ok", 1), ("nan", "error", None),
        ("inf", "error", None), ("-inf", "error", None), ("text", "error", None),
        ("nothing", "error", None), ("no reward", "error", None), ("exits", "error", None),
        ("exits at once", "error", None), ("stops", "timeout", None), ("closes stdout", "ok", 1),
        ("closes all", "error", None), ("doubles", "ok", 1), ("doubles and raises", "error", None),
        ("nests", "error", None),
    ],
)  # fmt: skip
def test_a_hostile_function_costs_its_own_row_alone(write, text, status, value):
    write(HOSTILE)
    parts = [{"name": "own.py:judge"}, {"name": "length", "limit": 1}]
    rows = judged(["a", text, "b"], parts, timeout_s=2, memory_mib=1024)
    assert [row["parts"][0]["value"] for row in rows] == [0.5, value, 0.5]
    assert [row["status"] for row in rows] == ["ok", status, "ok"]
    assert (rows[1]["reward"] is None) == (value is None)
    assert rows[1]["parts"][1]["value"] == 0  # the other part still has its value


def test_what_a_function_leaves_running_ends_with_its_worker(write):
    name = f"left{os.urandom(4).hex()}"
    write(
        f"""
        import ctypes, os, time

        def judge(response):
            if os.fork() == 0:
                ctypes.CDLL(None).prctl(15, {name.encode()!r})  # its name
                time.sleep(600)
            while {name!r} not in names():
                time.sleep(0.01)
            return 1

        def names():
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    yield open(f"/proc/{{pid}}/comm").read().strip()
                except OSError:
                    pass
        """
    )
    (row,) = judged(["a"], [{"name": "own.py:judge"}], memory_mib=1024)
    assert row["reward"] == 1
    wait_until(lambda: not called(name), 10)


def test_an_own_function_sees_the_metadata_of_the_problem(write):
    write("def judge(metadata): return metadata['metadata']['limit'] / 4")
    metadata = {"metadata": json.dumps({"limit": 3})}
    (row,) = judged(["x"], [{"name": "own.py:judge"}], problem=metadata)
    assert row["reward"] == 0.75


def test_the_source_of_a_function_is_in_the_identity(write):
    write("def judge(): return 1")
    config = VerifyConfig.model_validate({"rewards": [{"name": "exact"}, {"name": "own.py:judge"}]})
    first = config.semantic(), verifier_identity(config)
    write("def judge(): return 0")
    assert config.semantic() != first[0]
    assert verifier_identity(config) != first[1]
    assert "rewards" not in VerifyConfig().semantic()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("rewards=[{name: regx}]", "rewards.0.name 'regx': is none of .*did you mean regex"),
        ("rewards=[{weight: 1}]", "rewards.0: names no name; .*one of answer, choice, math"),
        ("rewards=[{name: regex}]", "rewards.0.pattern: is required"),
        ("rewards=[{name: regex, pattern: '(?=a)'}]", "is no regular expression of RE2"),
        ("rewards=[{name: regex, pattern: '(?P<answer>a)(b)'}]", "write .* for the other groups"),
        ("rewards=[{name: format, patterns: ['(']}]", "is no regular expression of RE2"),
        ("rewards=[{name: length, limit: 0}]", "rewards.0.limit"),
        ("rewards=[{name: length, limit: 3, slak: 1}]", "slak: unknown key; .*slack"),
        ("rewards=[{name: math, weight: -1}]", "rewards.0.weight"),
        ("rewards=[{name: math, weight: 0}]", "all weights are 0"),
        ("rewards=[math]", "rewards.0: must be a section"),
        ("correct_by=1", "rewards is empty; give rewards"),
        ("rewards=[{name: math}] correct_by=exact", "name one of the parts math, or an index"),
        ("rewards=[{name: math}] correct_by=1", "correct_by is 1"),
        ("rewards=[{name: math}] correct_at=0", "correct_at"),
        ("rewards=[{name: math}] reward.engine=own.py:f", "reward and rewards are both given"),
    ],
)
def test_a_config_that_cannot_be_meant_is_a_sentence(settings, sentence):
    changes = re.split(r" (?=correct|reward\.)", settings)
    with pytest.raises(InputError, match=sentence):
        load_config(VerifyConfig, None, changes)


def test_a_function_that_is_not_there_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"rewards 'none\.py:f': none\.py: No such file"):
        judged(["x"], [{"name": "none.py:f"}])


# --- gym ---


def gym_problem(task, **settings):
    source = GymSource(kind="reasoning-gym", task=task, scored=True, settings=settings)
    (row,) = itertools.islice(sources.rows(source, 0), 1)
    return row


def test_gym_scores_what_no_comparison_could():
    row = gym_problem("countdown")
    right = row["answer"]
    texts = [rf"\boxed{{{right}}}", rf"\boxed{{\text{{{right}}}}}", r"\boxed{1}", ""]
    rows = judged(texts, [{"name": "gym"}], problem=row)
    assert [row["correct"] for row in rows] == [True, True, False, False]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "pred_unparsed"]


@pytest.mark.parametrize(
    ("task", "kept"), [("time_intervals", True), ("complex_arithmetic", False)]
)
def test_gym_makes_an_entry_again_that_json_would_change(task, kept):
    row = gym_problem(task)
    assert (json.loads(row["metadata"])["gym"]["entry"] is not None) == kept
    (found,) = judged([rf"\boxed{{{row['answer']}}}"], [{"name": "gym"}], problem=row)
    assert found["reward"] == 1.0


def test_a_gym_task_without_answers_yields_problems_to_score():
    row = gym_problem("graph_color")
    assert "any answer" in row["answer"]
    entry = json.loads(row["metadata"])["gym"]
    task = reasoning_gym.create_dataset("graph_color", seed=entry["seed"], size=entry["size"])
    right = json.dumps(task[entry["index"]]["metadata"]["possible_answer"])
    rows = judged([rf"\boxed{{{right}}}", r"\boxed{\{\}}"], [{"name": "gym"}], problem=row)
    assert [found["correct"] for found in rows] == [True, False]


def test_gym_without_metadata_says_how_to_make_it():
    with pytest.raises(InputError, match="scored: true"):
        judged(["x"], [{"name": "gym"}])

"""Hostile input to what judges and selects: configs of rewards, score, select and pools, and
problems whose metadata is not what a reward reads. Each ends with one sentence and exit code 2.
"""

import json
import sys
from pathlib import Path

import polars as pl
import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.cli import main

CONFIG = str(Path(__file__).parents[3] / "configs" / "micro.yaml")
GYM = {"task": "chain_sum", "settings": {}, "seed": 1, "size": 1, "index": 0, "entry": None}
OWN = "OWN = 3\ndef judge(response): return 1.0\n"


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder; its exit code and what it wrote to standard error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trace-opd", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def refused(command):
    """The one sentence with which a command is refused."""

    def run(*args: str) -> str:
        code, said = command(*args)
        assert code == 2, (args, said[:1000])
        assert "Traceback" not in said
        if "Usage:" not in said:  # typer's own refusal of an option
            assert said.startswith("trace-opd: ")
            assert said.count("\n") == 1, said
        assert len(said) < 2000
        return said

    return run


@pytest.mark.parametrize(
    "change",
    [
        "rewards=math",
        "rewards={name: math}",
        "rewards=[[]]",
        "rewards=[null]",
        "rewards=[{name: [math]}]",
        "rewards=[{name: {}}]",
        "rewards=[{name: math, weight: .nan}]",
        "rewards=[{name: math, weight: .inf}]",
        "rewards=[{name: math, weight: 1e400}]",
        "rewards=[{name: math, weight: x}]",
        "rewards=[{name: regex, pattern: ''}]",
        "rewards=[{name: regex, pattern: 'a{100000}'}]",
        "rewards=[{name: regex, pattern: '((((a{900}){900}){900}){900})'}]",
        f"rewards=[{{name: regex, pattern: '{'(' * 5000}'}}]",
        'rewards=[{name: regex, pattern: "\\ud800"}]',
        "rewards=[{name: format, patterns: []}]",
        "rewards=[{name: format, patterns: 3}]",
        "rewards=[{name: length, limit: 1e30}]",
        "rewards=[{name: length, limit: 3, slack: -1}]",
        "rewards=[{name: length, limit: 3, unit: words}]",
        "rewards=[{name: code, processes: 0}]",
        "rewards=[{name: code, file_mib: 0}]",
        "rewards=[{name: code, feedback_lines: -1}]",
        "rewards=[{name: code, score: most}]",
        "correct_at=.nan",
        "correct_by=null",
        "correct_by=[1]",
    ],
    ids=lambda text: text[:50],
)
def test_rewards_of_any_wrong_kind_are_refused(refused, change):
    changes = [change] if change.startswith("rewards") else ["rewards=[{name: math}]", change]
    refused("verify", *changes)
    refused("config", "verify", *changes)
    refused("train", CONFIG, *(f"online.verify.{one}" for one in changes))
    refused("evaluate", CONFIG, *(f"verify.{one}" for one in changes))


@pytest.mark.parametrize(
    "part",
    [
        "{name: 'own.py:'}",
        "{name: ':judge'}",
        "{name: 'own.py:judge:more'}",
        "{name: 'own.py:other'}",
        "{name: 'own.py:OWN'}",
        "{name: 'own.py:judge', options: 3}",
        "{name: 'own.py:judge', options: {size: 1}}",
        "{name: 'own.py:judge', options: {answer: 1}}",
        "{name: 'own.py:judge', sha256: 00}",
        "{name: 'nothing.py:judge'}",
        "{name: 'nothing:judge'}",
        "{name: '/dev/zero:judge'}",
        "{name: '.:judge'}",
        "{name: 'broken.py:judge'}",
        "{name: 'raises.py:judge'}",
        "{name: 'needs.py:judge'}",
    ],
)
def test_a_function_that_cannot_be_a_reward_is_refused(command, refused, part):
    imported(command, {})
    Path("broken.py").write_text("def judge(")
    Path("raises.py").write_text("raise KeyError('x')\n")
    Path("needs.py").write_text("def judge(response, size): pass\n")
    change = f"rewards=[{{name: math}}, {part}]"
    said = [refused("verify", "rollouts=done", change)]
    steps = ["online.problems=made", "offline.steps=0", "online.steps=1"]
    said.append(refused("train", CONFIG, *steps, f"online.verify.{change}"))
    assert all("rewards" in one for one in said)


VLLM = "teacher={engine: vllm, base_url: 'http://localhost:1/v1', model: m}"


@pytest.mark.parametrize(
    "changes",
    [
        ["k=0"],
        ["k=.nan"],
        ["k=1e30"],
        ["k=all"],
        ["temperature=0"],
        ["temperature=.nan"],
        ["temperature=.inf"],
        ["temperature=-1"],
        ["micro_batch_tokens=0"],
        ["teacher=3"],
        ["teacher={engine: magic}"],
        ["teacher={engine: vllm}"],
        ["teacher={engine: vllm, base_url: 'ftp://x', model: m}"],
        ["teacher={engine: vllm, base_url: [], model: m}"],
        ["teacher={engine: vllm, base_url: 'http://localhost:1/v1', model: m, concurrency: 0}"],
        [VLLM, "student.path=micro"],
        [VLLM, "temperature=0.5"],
        ["policy=micro"],
        ["prompt.teacher=3"],
        ["routed=nothing"],
        ["routed=[1]"],
        ["score=1"],
    ],
    ids=lambda changes: changes[-1][:50],
)
def test_a_score_of_any_wrong_kind_is_refused(refused, changes):
    refused("score", *changes)


@pytest.mark.parametrize(
    "pool",
    [
        "3",
        "[1]",
        "{}",
        "{rates: nothing}",
        "{rates: [1]}",
        "{bands: 3}",
        "{bands: [3]}",
        "{bands: [{}]}",
        "{bands: [{band: 0.5}]}",
        "{bands: [{band: [0.5]}]}",
        "{bands: [{band: [0.1, 0.2, 0.3]}]}",
        "{bands: [{band: [.nan, 1]}]}",
        "{bands: [{band: [0, .nan]}]}",
        "{bands: [{band: [0, .inf]}]}",
        "{bands: [{band: [1, 0]}]}",
        "{bands: [{band: [0, 1], from_step: -1}]}",
        "{bands: [{band: [0, 1], from_step: 0.5}]}",
        "{bands: [{band: [0, 1]}, {band: [0, 1]}]}",
        "{bands: [{band: [0, 1], from: 3}]}",
        "{unmeasured: drop}",
    ],
)
def test_a_pool_of_any_wrong_kind_is_refused(command, refused, pool):
    code, said = command("problems", CONFIG, "limit=2")
    assert code == 0, said
    refused("train", CONFIG, "offline.steps=0", f"online.pool={pool}")


@pytest.mark.parametrize(
    "args",
    [
        ["select", "pass_rate=[.nan, 1]"],
        ["select", "pass_rate=[0, .inf]"],
        ["select", "max_chars=0"],
        ["select", "budget=1e400"],
        ["select", "mixed=maybe"],
        ["select", "verdicts=[1]"],
        ["select", "verdict=x"],
        ["contamination"],
        ["contamination", "problems"],
        ["contamination", "", ""],
        ["contamination", "..", "*"],
        ["contamination", "a\0b", "problems"],
        ["contamination", "problems", "problems", "--output", "."],
        ["contamination", "problems", "problems", "--output", "own.py/pairs.csv"],
        ["contamination", "problems", "problems", "--words", "x"],
        ["problems", "source={kind: reasoning-gym, task: chain_sun, scored: true}", "limit=1"],
        ["problems", "source={kind: reasoning-gym, task: chain_sum, scored: maybe}", "limit=1"],
        ["problems", "source={kind: arithmetic}", "limit=1", "against=[[1]]"],
    ],
    ids=lambda args: " ".join(args)[:50],
)
def test_a_selection_and_a_check_of_contamination_refuse_any_wrong_kind(command, refused, args):
    code, said = command("problems", "source={kind: arithmetic}", "limit=2")
    assert code == 0, said
    refused(*args)


def imported(command, metadata: object) -> None:
    """Datasets `made` and `answered`: two problems, the second with this metadata, and a response
    to each.
    """
    about = [{"limit": 1}, metadata]
    rows = [{"question": f"{n}+1", "answer": str(n + 1), "about": about[n]} for n in range(2)]
    Path("made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "source={kind: files, path: made.jsonl, columns: {metadata: about}}"
    code, said = command("problems", source, "--alias", "made")
    assert code == 0, said
    texts = [
        {
            "rollout_id": f"r{n}",
            "problem_id": row["problem_id"],
            "response": "```\npass\n```\n\\boxed{1}",
        }
        for n, row in enumerate(Store("store").get("made").read(["problem_id"]).to_pylist())
    ]
    Path("answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    code, said = command("import", "rollouts", "answered.jsonl", "--of", "made", "--alias", "done")
    assert code == 0, said


@pytest.mark.parametrize(
    "tests",
    [
        3,
        "def check(f): pass",
        ["assert True"],
        {"tests": 3},
        {"tests": ["assert True"]},
        {"tests": "assert True", "entry_point": 3},
        {"tests": "assert True", "prompt": ["a"]},
        {"cases": 3},
        {"cases": {"stdin": "1"}},
        {"cases": ["1"]},
        {"cases": [{"stdin": "1"}]},
        {"cases": [{"stdin": 1, "stdout": 2}]},
    ],
    ids=repr,
)
def test_metadata_that_holds_no_tests_is_one_sentence(command, refused, tests):
    imported(command, {"code": tests})
    said = refused("verify", "rollouts=done", "rewards=[{name: code, allow_unisolated: true}]")
    assert "rewards: code: problem " in said
    assert "source.columns.tests" in said


@pytest.mark.parametrize(
    "entry",
    [
        3,
        "chain_sum",
        {},
        *({name: value for name, value in GYM.items() if name != left} for left in GYM),
        GYM | {"task": 3},
        GYM | {"settings": [1]},
        GYM | {"seed": "1"},
        GYM | {"size": 0},
        GYM | {"index": -1},
        GYM | {"entry": "x"},
    ],
    ids=lambda entry: repr(entry)[:60],
)
def test_metadata_that_no_gym_wrote_is_one_sentence(command, refused, entry):
    imported(command, {"gym": entry})
    said = refused("verify", "rollouts=done", "rewards=[{name: gym}]")
    assert "rewards: gym: problem " in said
    assert "scored: true" in said


@pytest.mark.parametrize(
    "entry",
    [
        GYM | {"task": "no such task"},
        GYM | {"settings": {"min_terms": "x"}},
        GYM | {"settings": {"size": 3}},
        GYM | {"entry": {"answer": None}},
    ],
    ids=lambda entry: repr(entry)[:60],
)
def test_metadata_that_reasoning_gym_refuses_costs_its_own_row_alone(command, entry):
    imported(command, {"gym": entry})
    parts = "rewards=[{name: gym, weight: 0}, {name: format}]"
    code, said = command("verify", "rollouts=done", parts, "correct_by=format")
    assert code == 0, said
    assert "Traceback" not in said
    verdicts = pl.read_parquet(Store("store").get("verdicts").glob)
    statuses = [parts[0]["status"] for parts in verdicts["parts"].to_list()]
    assert statuses[0] == "gold_unparsed"  # it has no gym's metadata
    assert statuses[1] == "error"
    assert verdicts["reward"].to_list() == [1.0, 1.0]

"""examples/rewards: parts of a reward in every stage that judges, and programs judged by tests."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.verifiers import sandbox
from trace_opd.pipelines.viewer.overview import overview
from trace_opd.pipelines.viewer.rollout_tables import find_tables
from trace_opd.schemas.errors import InputError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", name="example")
def _example(tmp_path_factory) -> Path:
    """The folder of the example, after its pipeline has run."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLES, folder / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        app(["pipeline", "examples/rewards/config.yaml"], standalone_mode=False)
    return folder


def parts(frame: pl.DataFrame) -> pl.DataFrame:
    """A row per verdict, a column per part."""
    return (
        frame.select("rollout_id", "reward", "correct", "status", "parts")
        .explode("parts")
        .unnest("parts", separator="_")
        .pivot("parts_name", index=["rollout_id", "reward", "correct"], values="parts_value")
    )


def test_parts_are_kept_weighed_and_summed_up_in_every_stage(example):
    store = Store(example / "store")
    verdicts = store.get("rewards-verdicts")
    online = store.get(store.get("rewards-train").summary["tables"]["verdicts"])
    for dataset in (verdicts, online):
        ended = pl.read_parquet(dataset.glob).filter(pl.col("status") != "truncated")
        found = parts(ended)
        mean = 0.7 * found["math"] + 0.2 * found["reward:closeness"] + 0.1 * found["length"]
        assert found["reward"].to_list() == pytest.approx(mean.to_list())
        assert (found["correct"] == (found["math"] == 1)).all()
        assert len(found) > 0
    figures = verdicts.summary["parts"]
    assert list(figures) == ["math", "reward:closeness", "length", "format"]
    assert all(0 <= figure["mean"] <= 1 for figure in figures.values())
    shown = overview(find_tables(store.get("rewards-routed"), store)).tiles
    assert [label for label, _, _ in shown if label.startswith("reward: ")] == [
        f"reward: {name}" for name in figures
    ]
    assert store.get("rewards-evaluation").summary["policies"].keys() == {"base", "trained"}


def test_another_weight_or_function_is_another_dataset_and_the_same_is_not(example, monkeypatch):
    monkeypatch.chdir(example)
    store, config = Store("store"), "examples/rewards/config.yaml"
    command = ["verify", config, "rollouts=rewards-rollouts", "--alias", "again"]
    app(command, standalone_mode=False)
    first = store.get("rewards-verdicts").ref
    assert store.get("again").ref == first
    app([*command, "correct_by=length"], standalone_mode=False)
    assert store.get("again").ref != first
    file = example / "examples" / "own-code" / "reward.py"
    file.write_text(file.read_text().replace("else 0.0", "else 0.5"))
    app(command, standalone_mode=False)
    assert store.get("again").ref != first


def test_programs_of_a_file_are_judged_by_its_tests(tmp_path, monkeypatch):
    try:
        sandbox.find_sandbox(False)
    except InputError as error:
        pytest.skip(str(error))
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    source = "source={kind: files, path: examples/rewards/programs.jsonl}"
    app(["problems", source, "--alias", "programs"], standalone_mode=False)
    store = Store("store")
    rows = []
    for problem in store.get("programs").read().to_pylist():
        for name, text in (("right", problem["solution"]), ("wrong", "pass")):
            response = f"```python\n{text}\n```"
            about = {"rollout_id": f"{problem['source_id']} {name}", "response": response}
            rows.append(about | {"problem_id": problem["problem_id"]})
    Path("made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ["import", "rollouts", "made.jsonl", "--of", "programs", "--alias", "made"]
    app(made, standalone_mode=False)
    app(
        ["verify", "rollouts=made", "rewards=[{name: code}]", "--alias", "judged"],
        standalone_mode=False,
    )
    judged = pl.read_parquet(store.get("judged").glob)
    right = judged["rollout_id"].str.ends_with("right")
    assert (judged["correct"] == right).all()
    assert judged["parsed_answer"].is_not_null().all()

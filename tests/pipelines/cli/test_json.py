"""--json: every command that prints a table prints one JSON document instead, and nothing else on
standard output; its figures are those of the table.
"""

import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.cli.commands import app

CONFIG = str(Path(__file__).parents[3] / "configs" / "micro.yaml")
# What commands without --json print instead of a table.
NO_TABLE = {
    "alias": "nothing",
    "config": "YAML, or a JSON schema",
    "demo": "what its stages print",
    "export": "a path",
    "import": "the datasets' names",
    "init": "a path",
    "plot": "a path",
    "push": "an address",
    "report": "a path",
    "serve": "a server's log",
    "study": "a path; --dry-run YAML",
    "view": "an address",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store with the tables of a small run; tests leave it as it is."""
    root = tmp_path_factory.mktemp("json") / "store"
    for words in (
        ["problems", CONFIG, "limit=4", "rows_per_part=2"],
        ["rollout", CONFIG, "group_size=4"],
        ["verify", CONFIG],
        ["annotate", CONFIG, "--alias", "line"],
        ["annotate", CONFIG, "annotator.match=value", "--alias", "value"],
        ["convert", CONFIG, "annotations=line"],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["trace-opd", *words, "--store", str(root)])
            with pytest.raises(SystemExit) as ended:
                main()
        assert not ended.value.code
    return root


@pytest.fixture
def asked(monkeypatch, capsys):
    """The JSON document of a command; every line of its standard output belongs to it."""

    def ask(*words: object, code: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["trace-opd", *map(str, words), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert int(ended.value.code or 0) == code, said.err
        return json.loads(said.out, parse_constant=pytest.fail)  # NaN is no JSON

    return ask


def test_every_command_has_it_or_prints_no_table():
    have = set()
    for command in app.registered_commands:
        assert command.callback is not None
        if "as_json" in inspect.signature(command.callback).parameters:
            have.add(command.name or command.callback.__name__)
    names = {command.name or command.callback.__name__ for command in app.registered_commands}  # pyright: ignore[reportOptionalMemberAccess]
    assert names - have == set(NO_TABLE)


def test_a_stage_prints_its_dataset(made, tmp_path, asked):
    root = shutil.copytree(made, tmp_path / "store")
    found = asked("verify", CONFIG, "--alias", "mine", "--store", root)
    dataset = Store(root).get("mine")
    assert found["dataset"] == dataset.ref
    assert found["aliases"] == ["mine"]
    assert (found["rows"], found["parts"]) == (16, 2)
    assert found["summary"] == dataset.summary
    assert found["inputs"] == dataset.manifest["inputs"]
    assert Path(found["manifest"]).is_file()


def test_what_a_stage_says_besides_is_on_standard_error(made, tmp_path, monkeypatch, capsys):
    root = str(shutil.copytree(made, tmp_path / "store"))
    words = ["annotate", CONFIG, "annotator.match=value", "--alias", "line", "--json"]
    monkeypatch.setattr(sys, "argv", ["trace-opd", *words, "--store", root])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr()
    assert json.loads(said.out)["aliases"] == ["line"]
    assert said.err.startswith("line: was annotate/")


def test_a_dry_run_says_what_would_be_made(made, asked):
    store = ("--store", made)
    there = asked("verify", CONFIG, "--dry-run", *store)
    assert there["dataset"] == Store(made).get("verdicts").ref
    assert (there["finished"], there["parts"], there["stage"]) == (True, 2, "verify")
    new = asked("verify", CONFIG, "timeout_s=3.5", "--dry-run", *store)
    assert new["config"]["timeout_s"] == 3.5
    assert "parts_there" in new


def test_ls_lists_what_the_store_has(made, asked):
    store = Store(made)
    listed = asked("ls", "--store", made)
    assert {one["dataset"] for one in listed} == {dataset.ref for dataset in store.datasets()}
    (verdicts,) = asked("ls", "verify", "--store", made)
    assert verdicts["aliases"] == ["verdicts"]
    assert verdicts["rows"] == 16
    assert asked("ls", "evaluate", "--store", made) == []


def test_show_has_a_dataset_and_a_rollout(made, asked):
    store = Store(made)
    shown = asked("show", "line", "--store", made)
    assert shown["summary"] == store.get("line").summary
    row = store.get("line").read().to_pylist()[0]
    rollout = asked("show", row["rollout_id"], "--store", made)
    assert rollout["rollout_id"] == row["rollout_id"]
    rollouts = {r["rollout_id"]: r for r in store.get("rollouts").read().to_pylist()}
    response = rollouts[row["rollout_id"]]["response"]
    assert "".join(piece["text"] for piece in rollout["text"]) == response
    assert {piece["paint"] for piece in rollout["text"]} <= {"grpo", "fkl", "dropped", "marked"}


def test_lineage_nests_inputs(made, asked):
    tree = asked("lineage", "routed", "--store", made)
    assert tree["role"] is None
    roles = {child["role"]: child["dataset"] for child in tree["inputs"]}
    assert roles["annotations"] == Store(made).get("line").ref


def test_compare_has_the_overall_rows(made, tmp_path, asked):
    found = asked("compare", "line", "value", "--output", tmp_path, "--store", made)
    assert [row["kind"] for row in found["pairs"]] == ["key", "error", "all"]
    assert found["rollouts"] == 16
    assert all(Path(file).is_file() for file in found["files"])


def test_verify_store_has_findings_and_keeps_its_exit_code(made, tmp_path, asked):
    assert asked("verify-store", "--store", made)["intact"] is True
    root = Path(shutil.copytree(made, tmp_path / "store"))
    part = next((root / "verify").glob("*/part-00000.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    found = asked("verify-store", "--store", root, code=1)
    (broken,) = found["findings"]
    assert (broken["state"], broken["file"]) == ("broken", part.name)
    (command,) = found["commands"]
    assert command.startswith("rm -r ")


def test_removals_list_what_goes(made, tmp_path, asked):
    root = Path(shutil.copytree(made, tmp_path / "store"))
    ref = Store(root).get("value").ref
    planned = asked("rm", "value", "--dry-run", "--store", root)
    assert (planned["removed"], planned["datasets"][0]["dataset"]) == (False, ref)
    assert Store(root).get("value").ref == ref
    done = asked("rm", "value", "--store", root)
    assert done["removed"] is True
    assert done["bytes"] == planned["bytes"] > 0
    assert not Store(root).matches("value")
    assert asked("gc", "--store", root) == {"removed": False, "bytes": 0, "found": []}


def test_contamination_has_all_pairs(made, asked):
    found = asked("contamination", "problems", "problems", "--store", made)
    (other,) = found["held_out"]
    assert (other["problems"], other["shared"]) == (
        4,
        len({p["problem_id"] for p in found["pairs"]}),
    )


def test_a_probe_has_figures_findings_and_a_preset(made, asked):
    found = asked("probe", "line", "--problems", "2", "--samples", "2", "--store", made)
    assert found["annotations"] == Store(made).get("line").ref
    assert (found["problems"], found["rollouts"], found["samples"]) == (2, 8, 2)
    low, high = found["figures"]["pass_rate"]["ci95"]
    assert 0 <= low <= found["figures"]["pass_rate"]["value"] <= high <= 1
    assert found["findings"][-1]["region"] in ("hint without content", "starved", "plentiful")
    assert found["preset"] in ("grpo", "trace-rkl")


def test_a_plan_has_bytes(asked):
    given = ("--gpus", "1", "--memory", "80", "--tflops", "400", "--bandwidth", "3000")
    found = asked("plan", CONFIG, *given)
    assert (
        found["peak_bytes"]
        == sum(found["held"].values()) + sum(found["phases"][found["peak_phase"]].values())
        or found["peak_phase"] == "start"
    )
    assert found["trained"] == found["parameters"] > 0


def test_a_pipeline_has_its_plan_and_its_evaluation(tmp_path, asked):
    small = [
        *("problems.limit=2", "eval_problems.limit=2", "rollout.group_size=4"),
        *("train.groups_per_step=2", "train.online.group_size=2", "train.offline.steps=1"),
        *("train.online.steps=1", "evaluate.k=2", "evaluate.bootstrap=100"),
    ]
    store = ("--store", tmp_path / "store")
    plan = asked("pipeline", CONFIG, *small, "--dry-run", *store)
    assert plan["stages"][0]["stage"] == "problems"
    assert plan["faults"] == []
    made = asked("pipeline", CONFIG, *small, *store)
    assert made["datasets"]["train"].startswith("train/")
    assert Path(made["report"]).is_file()
    evaluation = Store(tmp_path / "store").get(made["datasets"]["evaluation"])
    assert made["evaluation"] == evaluation.summary


def test_a_bad_request_prints_no_document(made, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["trace-opd", "show", "nothing", "--json", "--store", str(made)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)

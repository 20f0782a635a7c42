"""Where metrics go: the JSON lines, and each tracker with its real package."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trace_opd.data.store import Store
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.pipelines.training import tracking
from trace_opd.pipelines.training.boards import check_tracker
from trace_opd.pipelines.training.tracking import Tracker
from trace_opd.schemas.configs import ProblemsConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import override

REF = "train/0123abcd"
FACTS = {"dataset": REF, "preset": "preset trace", "inputs": {"problems": "problems/4567"}}
ROWS = [
    {"rollout_id": "r0", "problem": "1+1 | 2", "response": "⟦fkl 1+1=2⟧\nso `2`", "reward": 1.0},
    {"rollout_id": "r1", "problem": "1+1 | 2", "response": "3", "reward": 0.0},
]
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from trace_opd.pipelines.training.tracking import Tracker
folder, kind, first, last, end, facts, rows = sys.argv[1:]
config = {"seed": 7, "optim": {"lr": 0.5}, "checkpoint_every": int(last)}
tracker = Tracker(Path(folder), int(first), kind, "train/0123abcd", config, json.loads(facts))
for step in range(int(first), int(last)):
    metrics = {"step": step, "phase": "offline", "loss": 1.0 / (step + 1)}
    table = json.loads(rows) if step % 2 == 0 else []
    tracker.log(metrics, {"collapse/entropy_limit": 0.5}, table)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.close()
"""


def track(folder, kind, first, last, end="close", **environment):
    """Log some steps in a process of its own; what it prints to stderr."""
    arguments = [str(folder), kind, str(first), str(last), end, json.dumps(FACTS), json.dumps(ROWS)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=folder,
        env=os.environ | environment,
    )
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    return done.stderr


def scalars(folder):
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert sorted(board.Tags()["scalars"]) == ["collapse/entropy_limit", "loss"]
    return {event.step: event.value for event in board.Scalars("loss")}


def test_a_killed_run_has_every_logged_step_and_the_resumed_one_replaces_what_it_repeats(tmp_path):
    track(tmp_path, "tensorboard", 0, 5, "kill")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert sorted(scalars(tmp_path)) == [0, 1, 2, 3, 4]
    track(tmp_path, "tensorboard", 3, 7)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[4] == {"step": 4, "phase": "offline", "loss": 0.2}
    assert scalars(tmp_path) == {step: pytest.approx(1 / (step + 1)) for step in range(7)}


def test_without_a_tracker_there_are_json_lines_and_nothing_else(tmp_path):
    tracker = Tracker(tmp_path, 0, "none")
    tracker.log({"step": 0, "loss": 1.5})
    tracker.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "loss": 1.5}


@pytest.mark.parametrize("kind", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_board_that_is_not_installed_is_named_with_its_pip_command(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)  # find_spec then reports it as not installed
    with pytest.raises(InputError, match=f"pip install {kind}"):
        check_tracker(kind)
    with pytest.raises(InputError, match="tracker=none"):
        Tracker(tmp_path, 0, kind, REF)
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_completions_as_text_and_what_the_run_was_made_from(tmp_path):
    track(tmp_path, "tensorboard", 0, 3)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def texts(name: str) -> dict[int, str]:
        events = board.Tensors(f"{name}/text_summary")
        return {event.step: event.tensor_proto.string_val[0].decode() for event in events}

    assert sorted(texts("completions")) == [0, 2]
    shown = texts("completions")[2]
    assert "rollout_id r0 · reward 1.0" in shown
    assert "    ⟦fkl 1+1=2⟧\n    so `2`" in shown  # as code, whatever it holds
    recorded = json.loads(texts("run")[0])
    assert recorded["inputs"] == FACTS["inputs"]
    assert recorded["config"]["optim"] == {"lr": 0.5}


def wandb_records(file):
    """The records of an offline run: its history by step, and its config."""
    datastore = pytest.importorskip("wandb.sdk.internal.datastore")
    from wandb.proto.wandb_internal_pb2 import Record

    store, history, config = datastore.DataStore(), {}, {}
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            line = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            history.setdefault(int(line["_step"]), {}).update(line)
        for one in record.run.config.update:
            config[one.key] = json.loads(one.value_json)
    return history, config


def test_wandb_resumes_the_dataset_s_run_offline_with_its_tables(tmp_path):
    pytest.importorskip("wandb")
    track(tmp_path, "wandb", 0, 3, WANDB_MODE="offline")
    track(tmp_path, "wandb", 2, 5, WANDB_MODE="offline")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-train-0123abcd.wandb"))
    assert len(files) == 2  # both sync to the same run
    for file, steps in zip(files, (range(3), range(2, 5)), strict=True):
        assert REF.encode() in file.read_bytes()  # the run's name
        history, config = wandb_records(file)
        assert [history[step]["loss"] for step in steps] == [1 / (step + 1) for step in steps]
        assert all(history[step]["collapse/entropy_limit"] == 0.5 for step in steps)
        assert config["preset"] == FACTS["preset"]
        assert config["inputs"] == FACTS["inputs"]
        assert config["optim"] == {"lr": 0.5}
        for step in (step for step in steps if step % 2 == 0):
            media = history[step]["completions"]["path"]
            table = json.loads((file.parent / "files" / media).read_text())
            assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == ROWS
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(5))


def test_trackio_resumes_the_dataset_s_run_with_its_tables(tmp_path):
    pytest.importorskip("trackio")
    folder = tmp_path / "run"
    folder.mkdir()
    track(folder, "trackio", 0, 3, TRACKIO_DIR=str(tmp_path / "trackio"))
    track(folder, "trackio", 3, 5, TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "trace-opd.db") as database:
        rows = database.execute("SELECT run_name, run_id, step, metrics FROM metrics").fetchall()
        configs = database.execute("SELECT config FROM configs").fetchall()
    assert {name for name, *_ in rows} == {REF}
    assert len({run_id for _, run_id, *_ in rows}) == 1
    logged: dict[int, dict] = {}
    for *_, step, metrics in rows:
        logged.setdefault(step, {}).update(json.loads(metrics))
    assert {step: line["loss"] for step, line in logged.items()} == {
        step: 1 / (step + 1) for step in range(5)
    }
    assert {step for step, line in logged.items() if "completions" in line} == {0, 2, 4}
    assert logged[4]["completions"]["_value"] == ROWS
    assert json.loads(configs[-1][0])["inputs"] == FACTS["inputs"]


@pytest.mark.parametrize("uri", ["sqlite:///{}/mlflow.db", "file://{}/mlruns"])
def test_mlflow_resumes_the_dataset_s_run_with_its_tables(tmp_path, uri, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    if uri.startswith("sqlite"):
        pytest.importorskip("mlflow.store.tracking.sqlalchemy_store")
    uri = uri.format(tmp_path)
    variables = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_FILE_STORE": "true"}
    track(tmp_path, "mlflow", 0, 3, **variables)
    track(tmp_path, "mlflow", 2, 5, **variables)  # with another operational setting
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    client = tracking.MlflowClient(uri)
    experiment = client.get_experiment_by_name("trace-opd")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (REF, "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {one.step: one.value for one in history} == {
        step: pytest.approx(1 / (step + 1)) for step in range(5)
    }
    assert run.data.params["optim.lr"] == "0.5"
    assert run.data.params["inputs.problems"] == FACTS["inputs"]["problems"]
    assert run.data.params["preset"] == FACTS["preset"]
    artifacts = client.list_artifacts(run.info.run_id, "completions")
    steps = [f"completions/step-{step:06}.json" for step in (0, 2, 4)]
    assert [one.path for one in artifacts] == steps
    path = client.download_artifacts(run.info.run_id, steps[2], str(tmp_path))
    table = json.loads(Path(path).read_text())
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == ROWS
    recorded = client.download_artifacts(run.info.run_id, "run.json", str(tmp_path))
    assert json.loads(Path(recorded).read_text())["config"]["checkpoint_every"] == 5


@pytest.mark.parametrize(
    ("kind", "variables"),
    [
        ("tensorboard", {}),
        ("wandb", {"WANDB_MODE": "online", "WANDB_API_KEY": ""}),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
                    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}),
    ],
)  # fmt: skip
def test_a_tracker_that_fails_is_one_warning_and_metrics_go_on(kind, variables, tmp_path):
    """A file where TensorBoard's folder would be; no key; no server. trackio warns by itself."""
    pytest.importorskip(kind)
    (tmp_path / "tensorboard").write_text("in the way")
    home = {"HOME": str(tmp_path)}  # no login of W&B
    err = track(tmp_path, kind, 0, 3, **variables | home)
    assert err.count(f"tracker {kind} failed (") == 1, err
    assert "the training goes on without it" in err
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_tracker_that_does_not_end_is_left_behind(monkeypatch):
    waits = threading.Event()
    with pytest.raises(TimeoutError, match="was not done sending"):
        tracking._within(0.05, waits.wait)
    waits.set()
    with pytest.raises(ValueError, match="its own"):
        tracking._within(10.0, lambda: int("its own"))


def test_a_training_sends_completions_what_is_watched_and_what_it_was_made_from(tmp_path):
    """A training of the micro policy, read back from TensorBoard."""
    store = Store(tmp_path)
    run_stage("problems", ProblemsConfig(source={"kind": "arithmetic"}, limit=8), store)
    settings = [
        "online.steps=5", "offline.steps=0", "groups_per_step=2", "online.group_size=4",
        "completions_every=2", "collapse.baseline_steps=2", "collapse.window_steps=1",
        "online.annotator={engine: rule, match: line}", "online.sampling.max_new_tokens=48",
        "online.routing.error=rkl",
    ]  # fmt: skip
    config = override(TrainConfig(online={"steps": 5}), settings)
    assert config.semantic() == override(config, ["completions_every=null"]).semantic()
    run = run_stage("train", config, store)
    board = EventAccumulator(str(Path(run.path()) / "tensorboard")).Reload()
    shown = board.Tensors("completions/text_summary")
    assert [event.step for event in shown] == [0, 2, 4]
    text = "".join(event.tensor_proto.string_val[0].decode() for event in shown)
    assert "⟦fkl " in text or "⟦rkl " in text
    limits = [event.step for event in board.Scalars("collapse/entropy_limit")]
    assert limits == [2, 3, 4]  # from the first step after those that are compared with
    recorded = json.loads(board.Tensors("run/text_summary")[0].tensor_proto.string_val[0])
    assert recorded["dataset"] == run.ref
    assert recorded["inputs"] == run.manifest["inputs"]

"""Where metrics go: the JSON lines, and each tracker with its real package."""

import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.pipelines.training.tracking import Tracker, check_tracker
from trace_opd.schemas.errors import InputError

REF = "train/0123abcd"
PROGRAM = """
import os, signal, sys
from pathlib import Path
from trace_opd.pipelines.training.tracking import Tracker
folder, kind, first, last, end = sys.argv[1:]
tracker = Tracker(Path(folder), int(first), kind, "train/0123abcd", {"seed": 7})
for step in range(int(first), int(last)):
    tracker.log({"step": step, "phase": "offline", "loss": 1.0 / (step + 1)})
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.close()
"""


def track(folder, kind, first, last, end="close", **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), kind, str(first), str(last), end],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr


def scalars(folder):
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["loss"]
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


@pytest.mark.parametrize("kind", ["tensorboard", "trackio", "wandb"])
def test_a_board_that_is_not_installed_is_named_with_its_pip_command(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)  # find_spec then reports it as not installed
    with pytest.raises(InputError, match=f"pip install {kind}"):
        check_tracker(kind)
    with pytest.raises(InputError, match="tracker=none"):
        Tracker(tmp_path, 0, kind, REF)
    assert not list(tmp_path.iterdir())


def test_wandb_resumes_the_dataset_s_run_offline(tmp_path):
    pytest.importorskip("wandb")
    track(tmp_path, "wandb", 0, 3, WANDB_MODE="offline")
    track(tmp_path, "wandb", 2, 5, WANDB_MODE="offline")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-train-0123abcd.wandb"))
    assert len(files) == 2  # both sync to the same run
    for file in files:
        content = file.read_bytes()
        assert REF.encode() in content  # the run's name
        assert b"loss" in content
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(5))


def test_trackio_resumes_the_dataset_s_run(tmp_path):
    pytest.importorskip("trackio")
    folder = tmp_path / "run"
    folder.mkdir()
    track(folder, "trackio", 0, 3, TRACKIO_DIR=str(tmp_path / "trackio"))
    track(folder, "trackio", 3, 5, TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "trace-opd.db") as database:
        rows = database.execute("SELECT run_name, run_id, step, metrics FROM metrics").fetchall()
    assert {name for name, *_ in rows} == {REF}
    assert len({run_id for _, run_id, *_ in rows}) == 1
    logged = {step: json.loads(metrics)["loss"] for *_, step, metrics in rows}
    assert logged == {step: 1 / (step + 1) for step in range(5)}

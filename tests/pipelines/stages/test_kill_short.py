"""Killed anywhere, nothing is lost: the short form of tests/kill, which `make test-kill` runs."""

import json
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.tests.kill.conftest import PARTS, PROMPT
from trace_opd.tests.kill.disk import disk
from trace_opd.tests.kill.ends import assert_no_leftovers, assert_same_datasets
from trace_opd.tests.kill.harness import (
    CONFIG,
    Killer,
    Launcher,
    assert_budget_holds,
    assert_refused,
    repeat,
    together,
)
from trace_opd.tests.pipelines.conftest import PaidServer, completion

CONCURRENCY = 4
PAID = [
    "annotate", "annotator.engine=openai", "annotator.model=m", "annotator.api_key_env=null",
    f"annotator.concurrency={CONCURRENCY}",
]  # fmt: skip
JUDGE = ["verify", CONFIG]
STAGES = {
    "problems": ["problems", CONFIG, "limit=6", "rows_per_part=2"],
    "rollout": ["rollout", CONFIG, "group_size=2"],
    "verify": ["verify", CONFIG],
    "select": ["select", CONFIG, "mixed=false", "budget=9"],
    "annotate": ["annotate", CONFIG],
    "convert": ["convert", CONFIG],
    "train": [
        "train", CONFIG, "offline.steps=1", "online.steps=2", "online.group_size=2",
        "groups_per_step=2", "schedule.hold_steps=2", "schedule.decay_steps=1",
        "checkpoint_every=1",
    ],
    "evaluate": ["evaluate", CONFIG, "k=1", "bootstrap=100"],
    "score": ["score", CONFIG, PROMPT, "k=8"],
    "verify-rewards": ["verify", CONFIG, f"rewards={PARTS}", "--alias", "rewarded"],
}  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    before: dict[str, Path]
    after: Path
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def runs(forks) -> Launcher:
    return forks


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory) -> Undisturbed:
    """A store with every stage's dataset, what it was before each, and how long each took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    root, before, seconds = folder / "store", {}, {}
    root.mkdir()
    for name, args in STAGES.items():
        before[name] = Path(shutil.copytree(root, folder / name))
        began = time.monotonic()
        runs.done(*args, store=root)
        seconds[name] = time.monotonic() - began
    return Undisturbed(before, root, seconds)


def test_every_stage_killed_twice_ends_as_an_undisturbed_one(runs, undisturbed, tmp_path):
    root = tmp_path / "made"
    root.mkdir()
    for number, (name, args) in enumerate(STAGES.items()):
        killer = Killer(runs, root, tmp_path / name, seed=number)
        for ended in killer.rounds(args, 2, 0.8 * undisturbed.seconds[name]):
            assert_no_leftovers(ended)
            shutil.copytree(ended, root, dirs_exist_ok=True)
        assert killer.toll.kills >= 2
    assert_same_datasets(root, undisturbed.after)


def test_killed_just_before_a_change_of_a_file_a_stage_goes_on(runs, undisturbed, tmp_path):
    killer = Killer(runs, undisturbed.before["convert"], tmp_path)
    for root in killer.changes(STAGES["convert"], step=6):
        assert_no_leftovers(root)
        assert_same_datasets(root, undisturbed.before["train"])
    assert killer.toll.kills >= 3


def test_checkpoints_left_by_a_kill_after_the_manifest_go_with_the_next_start(
    runs, undisturbed, tmp_path
):
    made = undisturbed.before["evaluate"]
    for number, options in enumerate(([], ["keep_checkpoints=true"])):
        root = Path(shutil.copytree(made, tmp_path / str(number)))
        (run,) = root.glob("train/*")
        for name in ("step-00003", ".tmp-step-00002"):
            (run / "checkpoints" / name).mkdir()
            (run / "checkpoints" / name / "x").touch()
        runs.done(*STAGES["train"], *options, store=root)
        kept = {path.name for path in (run / "checkpoints").iterdir()} - {"final"}
        assert kept == ({"step-00003", ".tmp-step-00002"} if options else set())
    with disk(tmp_path / "disk") as frozen:
        shutil.copytree(root, frozen.root)
        frozen.writable(False)
        done = runs.done(*STAGES["train"], store=frozen.root)
        assert "not all of its checkpoints could be removed" in " ".join(done.err.split())


DEADLY = """
import os, signal
from pathlib import Path

def judge(response):
    deaths = Path(__file__).with_name("deaths")
    if deaths.exists():
        deaths.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
    return 1.0
"""


def test_a_reward_that_kills_its_run_costs_a_start_and_no_row(runs, undisturbed, tmp_path):
    (tmp_path / "deadly.py").write_text(DEADLY)
    (tmp_path / "deaths").touch()
    root = Path(shutil.copytree(undisturbed.before["verify"], tmp_path / "store"))
    args = ["verify", CONFIG, f"rewards=[{{name: '{tmp_path}/deadly.py:judge'}}]"]
    assert runs.start(*args, store=root).wait() == -signal.SIGKILL
    runs.assert_nobody_is_left()
    runs.done(*args, store=root)
    assert_no_leftovers(root)
    verdicts = Store(root).get("verdicts").read()
    assert verdicts["reward"].to_pylist() == [1.0] * Store(root).get("rollouts").rows


def test_the_same_training_ends_with_the_same_bytes_each_time(runs, undisturbed, tmp_path):
    first, *others = repeat(runs, undisturbed.before["train"], tmp_path, times=4)
    for other in others:
        assert_same_datasets(other, first)


def test_a_trained_model_that_was_damaged_is_not_evaluated(runs, undisturbed, tmp_path):
    root = Path(shutil.copytree(undisturbed.before["evaluate"], tmp_path / "store"))
    weights = Path(Store(root).get("train").path("checkpoints/final/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # the last bits of a number: still a model
    weights.write_bytes(content)
    run = runs.start(*STAGES["evaluate"], "trained=train", store=root)
    assert_refused(run, str(weights), "does not hold what was written")


def test_of_two_runs_at_once_one_works_and_the_other_waits(runs, undisturbed, tmp_path):
    root = Path(shutil.copytree(undisturbed.before["verify"], tmp_path / "store"))
    first, second = together(runs, STAGES["verify"], root)
    assert (first.wait(), second.wait()) == (0, 0)
    assert_no_leftovers(root)
    assert_same_datasets(root, undisturbed.before["select"])


@pytest.mark.parametrize("name", ["annotate", "verify"])
def test_a_paid_stage_killed_asks_again_only_for_what_was_in_flight(
    paid_server: PaidServer, runs, undisturbed, tmp_path, name
):
    def answer(body):
        time.sleep(0.02)  # so that a kill finds requests in flight
        return completion(body)

    paid_server.answer = answer
    args = asking(name, paid_server.url)
    killer, kills = Killer(runs, undisturbed.before[name], tmp_path), 0
    for root in killer.rounds(args, 3, 0.6):
        assert_no_leftovers(root)
        (made,) = Store(root).datasets(name)
        assert made.rows == Store(root).get("rollouts").rows
        answered = Counter(map(json.dumps, paid_server.answered))
        keys = journalled(Path(made.path("journal")))
        assert max(keys.values()) == 1  # what was on the disk was not asked again
        assert len(keys) == len(answered)
        assert answered.total() - len(answered) <= (killer.toll.kills - kills) * CONCURRENCY
        kills = killer.toll.kills
        paid_server.answered.clear()


# The change of a file before which each stage gets its signal, and what it then says.
SIGNALS = {
    "problems": (2, "what is finished is kept"),
    "rollout": (3, "what is finished is kept"),
    "verify": (3, "what is finished is kept"),
    "select": (3, "what is finished is kept"),
    "annotate": (3, "what is finished is kept"),
    "convert": (3, "what is finished is kept"),
    "train": (24, "steps; a checkpoint is written"),
    "evaluate": (3, "what is finished is kept"),
    "score": (3, "what is finished is kept"),
    "verify-rewards": (3, "what is finished is kept"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_stage_with_the_command_that_continues_it(
    runs, undisturbed, tmp_path, number
):
    for index, (name, (change, kept)) in enumerate(SIGNALS.items()):
        if index % 2 == (number == signal.SIGINT) and name != "train":
            continue  # the other signal's share
        root = Path(shutil.copytree(undisturbed.before[name], tmp_path / name))
        run = runs.start(*STAGES[name], store=root, die_at=change, die_by=number)
        assert run.wait() == 128 + number, run.err
        assert "Traceback" not in run.err
        sentence = " ".join(run.err.split())
        assert kept in sentence
        command = shlex.join(["trace-opd", *STAGES[name], "--store", str(root)])
        assert sentence.endswith(f"; to continue: {command}")
        if name == "train":
            (checkpoint,) = root.glob("train/*/checkpoints/step-*")
            assert f"after {int(checkpoint.name[5:])} of 3 steps" in sentence
            runs.done(*STAGES[name], store=root)
            assert_same_datasets(root, undisturbed.before["evaluate"])
    runs.assert_nobody_is_left()


SERVED = ["rollout", CONFIG, "group_size=2", "sampler.engine=openai", "sampler.concurrency=4"]
ASKING = {"annotate": PAID, "rollout": SERVED}


def asking(name: str, url: str) -> list[str]:
    if name == "verify":
        about = f"base_url: '{url}', model: m, api_key_env: null, concurrency: {CONCURRENCY}"
        return [*JUDGE, f"rewards=[{{name: judge, {about}}}]"]
    return [*ASKING[name], f"{'annotator' if name == 'annotate' else 'sampler'}.base_url={url}"]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("annotate", signal.SIGTERM), ("annotate", signal.SIGINT), ("rollout", signal.SIGINT),
        ("verify", signal.SIGINT),
    ],
)  # fmt: skip
def test_a_signal_waits_for_the_answers_in_flight_and_keeps_them(
    paid_server: PaidServer, runs, undisturbed, tmp_path, name, number
):
    root = Path(shutil.copytree(undisturbed.before[name], tmp_path / "store"))
    args, answered = asking(name, paid_server.url), paid_server.answered

    def answer(body):
        time.sleep(0.1)
        return completion(body)

    paid_server.answer = answer
    run = runs.start(*args, store=root)
    while len(answered) < 2:
        time.sleep(0.01)
    os.killpg(run.pid, number)
    assert run.wait() == 128 + number, run.err
    assert "Traceback" not in run.err
    output = " ".join(run.err.split())
    assert re.search(r"waiting for [1-4] answers, Ctrl-C again to leave them", output)
    assert re.search(r"answers (that arrived|of this part) are kept", output)
    assert output.endswith(f"; to continue: trace-opd {shlex.join(args)} --store {root}")
    assert len(answered) < 12
    runs.done(*args, store=root)
    assert_no_leftovers(root)
    assert max(Counter(map(json.dumps, answered)).values()) == 1


@pytest.mark.parametrize(
    ("name", "number"),
    [("annotate", signal.SIGTERM), ("annotate", signal.SIGINT), ("rollout", signal.SIGINT)],
)
def test_a_second_signal_leaves_the_answers_in_flight_and_keeps_those_before(
    paid_server: PaidServer, runs, undisturbed, tmp_path, name, number
):
    root = Path(shutil.copytree(undisturbed.before[name], tmp_path / "store"))
    args = asking(name, paid_server.url)
    asked, done = threading.Event(), threading.Event()

    def kept() -> int:
        files = root.glob(f"{name}/*/*/*.jsonl")
        return sum(path.read_bytes().count(b"finish_reason") for path in files)

    def answer(body):
        if len(paid_server.chats) > 2:
            asked.set()
            done.wait(60)
        return completion(body)

    paid_server.answer = answer
    run = runs.start(*args, store=root)
    try:
        assert asked.wait(60), run.err
        os.killpg(run.pid, number)
        while "Ctrl-C again" not in run.err or kept() < 2:
            time.sleep(0.01)
        os.killpg(run.pid, number)
        assert run.wait(30) == 128 + number
        assert not done.is_set()
        assert "Traceback" not in run.err, run.err
        assert "to continue: trace-opd" in " ".join(run.err.split())
    finally:
        done.set()
    assert kept() == 2


def test_a_budget_holds_over_kills(paid_server: PaidServer, runs, undisturbed, tmp_path):
    root = Path(shutil.copytree(undisturbed.before["annotate"], tmp_path / "store"))
    kills, _ = assert_budget_holds(runs, paid_server, PAID, root, 0.024, 3)
    assert kills >= 1


def journalled(folder: Path) -> Counter[bytes]:
    """Complete records in a journal's files, by key."""
    complete = [
        line
        for path in folder.rglob("*.jsonl")
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
    return Counter(re.findall(rb'^{"key": ?"([^"]+)"', line)[0] for line in complete)


def test_a_full_disk_ends_in_a_sentence_and_the_stage_goes_on(runs, undisturbed, tmp_path):
    with disk(tmp_path / "disk") as full:
        shutil.copytree(undisturbed.before["convert"], full.root)
        full.leave(8192)
        run = runs.start(*STAGES["convert"], store=full.root)
        assert_refused(run, "could not be written", "make room", str(full.root))
        full.make_room()
        runs.done(*STAGES["convert"], store=full.root)
        assert_no_leftovers(full.root)
        assert_same_datasets(full.root, undisturbed.before["train"])


def test_a_store_that_cannot_be_written_serves_what_is_finished(runs, undisturbed, tmp_path):
    with disk(tmp_path / "disk") as frozen:
        shutil.copytree(undisturbed.before["train"], frozen.root)
        frozen.writable(False)
        runs.done(*STAGES["convert"], store=frozen.root)
        changed = [*STAGES["convert"], "routing.alpha=0.5"]
        assert_refused(runs.start(*changed, store=frozen.root), "is not a writable folder")

"""Kill every stage at 20 random moments and before each change of a file; the store must end like
an undisturbed one.

    make test-kill

Takes minutes and prints kills, starts and seconds. The short form is
tests/pipelines/stages/test_kill_short.py.
"""

import json
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from trace_opd.tests.kill.conftest import CONCURRENCY, PAID, STAGES, Undisturbed
from trace_opd.tests.kill.ends import assert_no_leftovers, assert_same_datasets, files
from trace_opd.tests.kill.harness import Killer, Launcher, Toll, assert_budget_holds, repeat
from trace_opd.tests.pipelines.conftest import PaidServer

KILLS = int(os.environ.get("KILLS", "20"))


@pytest.fixture
def report_toll(capsys):
    """Prints a stage's toll even when pytest captures the output."""

    def report(name: str, how: str, toll: Toll) -> None:
        with capsys.disabled():
            print(
                f"\n{name:16} {how:22} {toll.kills:4} kills {toll.starts:4} starts "
                f"{toll.rounds:4} ends {toll.seconds:7.1f} s"
            )

    return report


def assert_undisturbed(root: Path, stage: Undisturbed) -> None:
    assert_no_leftovers(root)
    assert_same_datasets(root, stage.after)


@pytest.mark.parametrize("name", [name for name in STAGES if name not in (*PAID, "report")])
def test_killed_at_random_moments(name: str, runs: Launcher, undisturbed, tmp_path, report_toll):
    stage = undisturbed[name]
    killer = Killer(runs, stage.before, tmp_path)
    for root in killer.rounds(stage.args, KILLS, 0.7 * stage.seconds):
        assert_undisturbed(root, stage)
    assert killer.toll.kills >= KILLS
    report_toll(name, "at random moments", killer.toll)


@pytest.mark.parametrize(
    ("name", "step"),
    [("problems", 3), ("verify-rewards", 3), ("convert", 3), ("score", 3), ("train-online", 6)],
)
def test_killed_before_each_change_of_a_file(
    name: str, step: int, runs: Launcher, undisturbed, tmp_path, report_toll
):
    stage = undisturbed[name]
    killer = Killer(runs, stage.before, tmp_path)
    for root in killer.changes(stage.args, step):
        assert_undisturbed(root, stage)
    assert killer.toll.kills >= KILLS
    report_toll(name, f"before every {step}. change", killer.toll)


@pytest.mark.parametrize("name", PAID)
def test_a_paid_stage_killed_asks_again_only_for_what_was_in_flight(
    name: str, slow_paid_server: PaidServer, runs: Launcher, undisturbed, tmp_path, report_toll
):
    stage = undisturbed[name]
    args = [arg.replace("ENDPOINT", slow_paid_server.url) for arg in stage.args]
    after = Path(shutil.copytree(stage.before, tmp_path / "after"))
    runs.done(*args, store=after)
    questions = Counter(map(json.dumps, slow_paid_server.answered))
    assert max(questions.values()) == 1
    killer, kills = Killer(runs, stage.before, tmp_path), 0
    slow_paid_server.answered.clear()
    for root in killer.rounds(args, KILLS, 2.0):
        assert_no_leftovers(root)
        assert_same_datasets(root, after)
        answered = Counter(map(json.dumps, slow_paid_server.answered))
        assert answered.keys() == questions.keys()
        lines = [
            line
            for path in root.glob(f"{args[0]}/*/journal/**/*.jsonl")
            for line in path.read_bytes().splitlines(keepends=True)
        ]
        keys = Counter(
            re.findall(rb'^{"key": ?"([^"]+)"', line)[0]
            for line in lines
            if line[-1:] == b"\n" and b'"record"' in line
        )
        # Journalled answers are not requested again; those paid twice were in flight at a kill.
        assert max(keys.values()) == 1
        assert len(keys) == len(questions)
        assert answered.total() - len(questions) <= (killer.toll.kills - kills) * CONCURRENCY
        kills = killer.toll.kills
        slow_paid_server.answered.clear()
    report_toll(name, "at random moments", killer.toll)


def test_a_paid_annotation_killed_again_and_again_bills_no_more_than_its_budget(
    paid_server: PaidServer, runs: Launcher, undisturbed, tmp_path, report_toll
):
    stage = undisturbed["annotate-openai"]
    root, began = Path(shutil.copytree(stage.before, tmp_path / "store")), time.monotonic()
    args = [arg for arg in stage.args if "ENDPOINT" not in arg]
    kills, _ = assert_budget_holds(runs, paid_server, args, root, 0.4, KILLS)
    assert kills >= min(KILLS, 10)
    # A raised budget continues, and only requests in flight at the kills were paid twice.
    runs.done(*args, f"annotator.base_url={paid_server.url}", store=root)
    answered = Counter(map(json.dumps, paid_server.answered))
    assert answered.total() - len(answered) <= kills * CONCURRENCY
    report_toll(
        "annotate-openai", "with a budget", Toll(kills, kills + 2, 1, time.monotonic() - began)
    )


def test_forty_undisturbed_trainings_end_with_the_same_bytes(runs, undisturbed, tmp_path):
    first, *others = repeat(runs, undisturbed["train-offline"].before, tmp_path, times=40)
    for other in others:
        assert_same_datasets(other, first)


def test_a_killed_report_is_written_atomically(runs: Launcher, undisturbed, tmp_path, report_toll):
    stage = undisturbed["report"]
    (page,) = stage.after.glob("train/*/report.html")
    name, killer = page.relative_to(stage.after), Killer(runs, stage.before, tmp_path)
    for root in killer.rounds(stage.args, KILLS, 0.7 * stage.seconds):
        assert files(root) == files(stage.after)
        assert same_page(root / name) == same_page(page)
    report_toll("report", "at random moments", killer.toll)


def same_page(path: Path) -> str:
    """A report without its store's path."""
    return path.read_text().replace(str(path.parents[2]), "STORE")

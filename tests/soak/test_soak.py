"""The short form of the soak (`make test-soak`), and tests of its parts."""

import errno
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from trace_opd.tests.kill.harness import CONFIG, Run, assert_refused
from trace_opd.tests.soak import invariants
from trace_opd.tests.soak.answers import CLEAN, FAILURES, Asked, transport
from trace_opd.tests.soak.file_faults import fingerprint, make_outside
from trace_opd.tests.soak.invariants import Broken
from trace_opd.tests.soak.mend import follow
from trace_opd.tests.soak.run import Soak, soak
from trace_opd.tests.soak.schedule import DAMAGES, FAULTS, STAGES, make_round

SEED, ROUNDS = 1225, (18, 33)  # rounds with kills, damage, links, odd answers, repeated questions


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Iterator[Soak]:
    with soak(SEED, tmp_path_factory.mktemp("soak")) as running:
        yield running


def test_rounds_of_kills_and_faults_lose_nothing_and_pay_nothing_twice(opened: Soak):
    if not opened.shim:
        pytest.skip("no C compiler to build the shim with")
    for number in ROUNDS:
        opened.play(number)
    assert opened.toll["rounds"] == len(ROUNDS)
    assert min(opened.toll[name] for name in ("kills", "refused", "requests")) >= 1


def test_a_fault_of_the_file_system_reaches_a_run(opened: Soak, tmp_path):
    if not opened.shim:
        pytest.skip("no C compiler to build the shim with")
    args, store = ["problems", CONFIG, "limit=2"], tmp_path / "store"
    full = opened.runs.start(*args, store=store, fault=(2, errno.ENOSPC, 1))
    assert_refused(full, "could not be written", "make room")
    short = opened.runs.start(*args, store=store, fault=(3, 0, 1))  # short writes
    assert short.wait() == 0, short.err


def test_a_seed_is_one_schedule_that_draws_everything():
    assert make_round(7, 3) == make_round(7, 3)
    assert make_round(7, 3) != make_round(7, 4)
    steps = [step for number in range(200) for step in make_round(0, number).steps]
    assert {step.stage for step in steps} == set(STAGES)
    assert {step.what for step in steps} == {"run", "twins", "rivals", "damage", "stale", "link"}
    assert {step.name for step in steps} >= {*FAULTS, *DAMAGES}


def test_the_endpoint_fails_by_round_question_and_attempt_and_answers_in_the_end():
    ways = [transport("r", f"{key}", attempt, True) for key in range(500) for attempt in range(4)]
    assert ways == [transport("r", f"{key}", n, True) for key in range(500) for n in range(4)]
    assert {*ways} == {*FAILURES, *CLEAN}
    assert {*ways[3::4]} <= {*CLEAN}
    assert {transport("r", f"{key}", 0, False) for key in range(500)} == {"plain"}


def asked(key: str, usd: float = 1.0, clean: bool = True) -> Asked:
    return Asked(key, 0, "plain", usd, clean)


def test_answers_paid_twice_or_lost_and_a_budget_exceeded_are_noticed(tmp_path):
    with pytest.raises(Broken, match="was on the disk"):
        invariants.not_paid_again({"a"}, [asked("a")])
    with pytest.raises(Broken, match="1 questions were asked again"):
        invariants.not_paid_again(set(), [asked("a"), asked("b"), asked("a")])
    invariants.not_paid_again(set(), [asked("a", clean=False), asked("a")])
    with pytest.raises(Broken, match="1 answers that were paid for"):
        invariants.not_lost(tmp_path, [asked("a")])
    invariants.not_lost(tmp_path, [asked("a")], most=1)
    with pytest.raises(Broken, match="the budget is"):
        invariants.within_budget([asked("a")], [asked("b")], 1.5)
    invariants.within_budget([asked("a")], [asked("b")], 2.0)


def test_a_store_that_differs_and_what_changed_next_to_it_are_noticed(opened: Soak, tmp_path):
    made, other = tmp_path / "made", tmp_path / "other"
    opened.runs.done("problems", CONFIG, "limit=2", store=made)
    shutil.copytree(made, other)
    invariants.as_undisturbed(made, other)
    (other / ".locks").mkdir()
    with pytest.raises(Broken):
        invariants.as_undisturbed(other, made)
    (other / ".locks").rmdir()
    (part,) = other.glob("problems/*/part-00000.parquet")
    part.unlink()
    with pytest.raises(Broken, match="gone"):
        invariants.as_undisturbed(other, made)
    make_outside(tmp_path / "outside")
    before = fingerprint(tmp_path / "outside")
    (tmp_path / "outside" / "folder" / "empty").write_text("123 host")
    assert fingerprint(tmp_path / "outside") != before


@pytest.mark.parametrize(
    ("code", "text", "found"),
    [
        (2, "trace-opd: no such file; give another\n", None),
        (0, "", None),
        (-9, "", None),
        (-15, "", None),
        (1, "Traceback (most recent call last):\n", "a traceback"),
        (0, "Exception ignored in: <function\n", "a traceback"),
        (2, "something else\n", "without a sentence"),
        (-11, "", "exit code -11"),
    ],
)
def test_how_a_run_ends_is_judged(code: int, text: str, found: str | None, tmp_path):
    output = [tmp_path / "1.out", tmp_path / "1.err"]
    for path, content in zip(output, ("", text), strict=True):
        path.write_text(content)
    run = Run(1, [str(path) for path in output], queue.SimpleQueue(), code)
    if found is None:
        invariants.ended_well(run, ["verify"])
        return
    with pytest.raises(Broken, match=found):
        invariants.ended_well(run, ["verify"])


def test_a_sentence_that_asks_to_remove_what_is_not_in_the_store_is_not_followed(tmp_path):
    text = f"trace-opd: {tmp_path}/x: does not hold what was written; remove it"
    with pytest.raises(Broken, match="not in the store"):
        follow(text, tmp_path / "store", lambda _: pytest.fail("gave a command"))
    assert not follow(text, Path("/"), lambda _: pytest.fail("gave a command"))

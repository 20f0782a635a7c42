"""Sampling one step ahead: whose weights make which step, and how it ends."""

import threading

import pytest

from trace_opd.schemas.errors import InputError, Stopped
from trace_opd.trace.online import Ahead, Following

STEPS = 5


class Trail:
    """A source that says which weights made each step's table, and a trainer's weights."""

    def __init__(self) -> None:
        self.weights = self.sampler = 0
        self.teachers: list[tuple[int, bool]] = []
        self.rests = 0
        self.threads: set[str] = set()
        self.fails_at = -1
        self.sampling = threading.Event()

    def follow(self) -> None:
        self.sampler = self.weights

    def rest(self) -> None:
        self.rests += 1

    def collect(self, step, with_teacher, phase):
        for name in ("sample", "verify", "route"):
            phase(name)
        self.sampling.set()
        if step == self.fails_at:
            raise InputError("the annotator's key is gone")
        self.teachers.append((step, with_teacher))
        self.threads.add(threading.current_thread().name)
        return (step, self.sampler), {"staleness": step - self.sampler}


def train(trail: Trail, source, first: int = 0) -> list[dict]:
    """Steps as the trainer makes them; the weights after step k are k + 1."""
    counts = []
    for step in range(first, STEPS):
        trail.weights = step
        (made, sampler), more = source.collect(step, step < 3, lambda _: None)
        assert made == step
        assert more["staleness"] == step - sampler
        counts.append(more)
    return counts


def ahead(trail: Trail) -> Ahead:
    return Ahead(trail, trail.follow, lambda step: step < 3, STEPS)


def test_one_ahead_is_one_step_stale_and_never_more():
    trail = Trail()
    source = ahead(trail)
    counts = train(trail, source)
    source.close()
    assert [more["staleness"] for more in counts] == [0, 1, 1, 1, 1]
    assert trail.teachers == [(step, step < 3) for step in range(STEPS)]
    assert len(trail.threads) == 2
    assert {"seconds_sample", "seconds_verify", "seconds_route"} <= counts[1].keys()


def test_a_resumed_run_begins_on_policy():
    trail = Trail()
    source = ahead(trail)
    counts = train(trail, source, first=2)
    source.close()
    assert [more["staleness"] for more in counts] == [0, 1, 1]


def test_without_it_every_step_is_on_policy_and_the_sampler_rests():
    trail = Trail()
    counts = train(trail, Following(trail, trail.follow, trail.rest))
    assert {more["staleness"] for more in counts} == {0}
    assert trail.rests == STEPS


def test_an_error_beside_training_comes_up_at_the_step_that_needs_the_table():
    trail = Trail()
    trail.fails_at = 2
    source = ahead(trail)
    with pytest.raises(InputError, match="key is gone"):
        train(trail, source)
    source.close()
    assert trail.teachers == [(0, True), (1, True)]


def test_a_run_that_is_stopped_while_it_waits_ends_and_so_does_the_step_in_the_making():
    trail = Trail()
    gate, phases = threading.Event(), []
    collect = trail.collect

    def slow(step, with_teacher, phase):
        if step == 1:
            phase("sample")
            gate.wait()
        return collect(step, with_teacher, phase)

    trail.collect = slow  # type: ignore[method-assign]
    source = ahead(trail)
    source.collect(0, True, phases.append)

    def stopping(phase: str) -> None:
        phases.append(phase)
        if phases.count("wait") == 2:
            raise Stopped

    with pytest.raises(Stopped):
        source.collect(1, True, stopping)
    threading.Timer(0.2, gate.set).start()
    source.close()
    assert trail.teachers == [(0, True)]

"""Progress: what is counted within a part, how fast, and when a line is printed."""

import io

import pytest

from trace_opd.pipelines import progress
from trace_opd.pipelines.progress import Meter, count_part, count_rows, count_tokens, progress_bar


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(meter: Meter, clock: Clock, counts: list[int], seconds: float) -> list[tuple]:
    """When a line is due, and what is done then; `counts` are done one after another."""
    found = []
    for count in counts:
        clock.now += seconds
        meter.advance(count)
        if meter.due():
            found.append((clock.now, meter.done))
    return found


def test_a_line_at_each_tenth_but_not_more_than_one_a_second():
    clock = Clock()
    steady = lines_of(Meter(100, "steps", clock), clock, [1] * 100, 2.0)
    assert [done for _, done in steady] == list(range(10, 101, 10))
    hasty = lines_of(Meter(1000, "steps", clock), clock, [10] * 100, 0.15)
    assert [round(at - 200) for at, _ in hasty] == [10, 11, 12, 14, 15]


def test_a_line_after_thirty_seconds_without_one_even_if_nothing_is_done():
    clock = Clock()
    assert lines_of(Meter(10, "steps", clock), clock, [0] * 65, 1.0) == [(30, 0), (60, 0)]


def test_rate_and_remaining_time_leave_out_what_earlier_runs_did():
    clock = Clock()
    meter = Meter(100, "steps", clock)
    meter.resume(40)
    assert meter.remaining_s is None
    clock.now = 10
    meter.advance(20, cost="$1.50")
    assert meter.words() == ["60/100 steps (60%)", "2/s", "0:20 left", "cost $1.50"]
    meter.advance(40)
    assert meter.words() == ["100/100 steps (100%)", "6/s", "cost $1.50"]  # nothing is left
    assert Meter(0, "rows", clock).words() == ["0/0 rows"]


@pytest.mark.parametrize(
    ("unit", "done"), [("rows", [3, 3, 4, 4]), ("responses", [0, 2, 4, 4]), ("steps", [0] * 4)]
)
def test_engines_count_within_a_part_what_its_meter_counts(unit, done):
    meter = Meter(8, unit, Clock())
    progress._open.append(meter)
    try:
        seen = []
        for report in (
            lambda: count_rows(3),
            lambda: count_tokens(100, responses=2),
            lambda: unit == "steps" or count_part(0, 4, made=True),
            lambda: unit == "steps" or count_part(0, 4, made=True),  # as a retry of its task
        ):
            report()
            seen.append(meter.done)
    finally:
        progress._open.remove(meter)
    assert seen == done
    assert meter.notes()["generated"] == "100 tokens"


def test_tokens_have_a_rate_before_the_first_response_ends():
    clock = Clock()
    meter = Meter(8, "responses", clock)
    for _ in range(41):
        meter.sampled(500)
        clock.now += 1
    assert meter.done == 0
    assert meter.notes()["generated"] == "20.5k tokens at 500/s"
    clock.now += 100  # a verification: no rate of minutes ago
    assert meter.notes()["generated"] == "20.5k tokens"


def test_without_a_terminal_lines_go_to_standard_error_alone(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SHORTEST_S", 0.0)
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    with progress_bar("verify", 2, "rows") as meter:
        meter.advance(2, cost="[red]$1\x1b")
        for tick in list(progress._ticks):
            tick()
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("trace-opd: verify: 2/2 rows (100%), ")
    assert err.endswith("cost [red]$1␛\n")


def test_a_process_that_shows_nothing_prints_nothing(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setattr(progress, "_silent", True)
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    with progress_bar("train", 1, "steps") as meter:
        meter.advance()
        assert not progress._ticks
    assert written.getvalue() == ""

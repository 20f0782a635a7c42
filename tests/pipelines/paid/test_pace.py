"""The request rate to an endpoint: concurrency, rates, cool-down, circuit breaker, in real time."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from trace_opd.pipelines.endpoint import refill_s, seconds_asked
from trace_opd.pipelines.paid.pace import Closed, Pace


async def rounds(pace: Pace, outcomes: str) -> None:
    """One request after another: s succeeds, o finds the endpoint overloaded, f fails otherwise."""
    for outcome in outcomes:
        async with pace.slot() as entered:
            if outcome == "s":
                pace.succeeded()
            else:
                pace.failed(entered, 0.0, overloaded=outcome == "o")


async def seconds_for(pace: Pace, count: int, tokens: float = 0.0, unused: float = 0.0) -> float:
    """Seconds until the last of `count` simultaneous requests is let through."""
    began = time.monotonic()

    async def one() -> None:
        async with pace.slot(tokens):
            pace.succeeded(unused)

    await asyncio.gather(*(one() for _ in range(count)))
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("outcomes", "limit"),
    [
        ("o", 12),
        ("oo", 9),
        ("ooo", 1),  # the circuit breaker is open: one request at a time
        ("ooos", 6),  # and closed again
        ("o" + 24 * "s", 12),
        ("o" + 25 * "s", 13),
        (100 * "s", 16),
        ("ff", 16),  # a server that is down is not overloaded
        ("fff", 1),
        ("fffs", 16),
        ("fofs", 12),
    ],
)
def test_concurrency_falls_by_a_quarter_and_grows_by_one(outcomes: str, limit: int):
    pace = Pace(16)
    asyncio.run(rounds(pace, outcomes))
    assert pace.limit == limit


def test_failures_of_one_round_count_once():
    async def one_round(pace: Pace) -> None:
        async with pace.slot() as first, pace.slot() as second:
            pace.failed(first, 0.0, overloaded=True)
            pace.failed(second, 0.0, overloaded=True)

    pace = Pace(16)
    asyncio.run(one_round(pace))
    assert pace.limit == 12


def test_an_overloaded_endpoint_is_left_alone_for_longer_each_time():
    async def entries(pace: Pace) -> list[float]:
        at = []
        for _ in range(3):
            async with pace.slot() as entered:
                at.append(entered)
                pace.failed(entered, overloaded=True)
        return at

    first, second, third = asyncio.run(entries(Pace(4)))
    assert 1.0 <= second - first < 1.5
    assert 2.0 <= third - second < 2.5


def test_time_without_success_is_measured_and_ends_with_a_success():
    async def failing(pace: Pace) -> tuple[float, float]:
        await rounds(pace, "f")
        await asyncio.sleep(0.1)
        await rounds(pace, "f")
        failing_s = pace.failing_s
        await rounds(pace, "s")
        return failing_s, pace.failing_s

    before, after = asyncio.run(failing(Pace(4)))
    assert 0.1 <= before < 0.5
    assert after == 0.0


def test_requests_keep_their_rate_with_a_second_of_burst():
    # 20 a second: 20 at once, then ten more in half a second.
    seconds = asyncio.run(seconds_for(Pace(64, requests_per_minute=1200), 30))
    assert 0.5 <= seconds < 0.8


def test_tokens_keep_their_rate_whatever_a_request_takes():
    # 1,000 a second. The first request takes the burst of one second and 1,000 more; the second one
    # waits for these and for another full burst.
    pace = Pace(64, tokens_per_minute=60_000)
    seconds = asyncio.run(seconds_for(pace, 2, tokens=1250))
    assert 1.25 <= seconds < 1.6


def test_unused_tokens_are_given_back():
    pace = Pace(1, tokens_per_minute=60_000)
    # It would take 3.5 s otherwise.
    assert asyncio.run(seconds_for(pace, 5, tokens=900, unused=800)) < 1.0


def test_closing_stops_waiting_requests_at_once_and_reopening_admits_again():
    async def closed_while_waiting(pace: Pace) -> float:
        pace.hold(30.0)
        waiting = asyncio.gather(*(rounds(pace, "s") for _ in range(4)), return_exceptions=True)
        await asyncio.sleep(0.05)
        began = time.monotonic()
        pace.close()
        assert [type(outcome) for outcome in await waiting] == [Closed] * 4
        with pytest.raises(Closed):
            await pace.sleep(30.0)
        return time.monotonic() - began

    async def reopened(pace: Pace) -> None:
        await rounds(pace, "s")
        pace.close()
        with pytest.raises(Closed):
            await rounds(pace, "s")
        pace.reopen()
        await rounds(pace, "s")

    assert asyncio.run(closed_while_waiting(Pace(2))) < 1.0
    asyncio.run(reopened(Pace(2)))


def test_retry_after_is_read_in_both_of_its_forms():
    assert (seconds_asked("2"), seconds_asked("0.5")) == (2.0, 0.5)
    assert seconds_asked("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert seconds_asked(soon) == pytest.approx(89, abs=2)
    assert (seconds_asked("soon"), seconds_asked("")) == (None, None)


@pytest.mark.parametrize(
    ("remaining", "limit", "reset", "seconds"),
    [
        ("0", "60", "1m0s", 1.0),  # one request per 60 s
        ("0", "500", "120ms", 0.12 / 500),
        ("1", "60", "59s", 0.0),  # one request is left
        ("0", "30000", "", 0.0),  # no reset is given
        ("", "", "6m0s", 0.0),
        ("0", "0", "1s", 0.0),
        ("0", "14400", "2h", 0.5),
    ],
)
def test_what_is_left_of_a_rate_limit_is_read_in_the_headers(remaining, limit, reset, seconds):
    headers = {
        "x-ratelimit-remaining-requests": remaining,
        "x-ratelimit-limit-requests": limit,
        "x-ratelimit-reset-requests": reset,
    }
    assert refill_s(headers, "requests", 1) == pytest.approx(seconds)

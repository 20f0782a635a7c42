"""Progress on standard error: a bar on a terminal, else a line now and then.

Stages, the study and `trace-opd verify-store` open a `Progress`. Engines report rows and tokens to
the one that is open, from any thread, and need not know which.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from .terminal import Terminal, is_quiet

# A line is printed at each tenth of the work, and after 30 s without one. Work of a few seconds
# prints none.
_QUIET_S = 10.0
_TENTHS, _LONGEST_S, _SHORTEST_S = 10, 30.0, 1.0
_RATE_S = 15.0  # that a rate of tokens covers at least

_open: list["Meter"] = []
_ticks: list[Callable[[], None]] = []  # of the bars and lines that are shown
_silent = False


def show_nothing() -> None:
    """No progress in this process: another one shows its share."""
    global _silent
    _silent = True


def show_fields(**fields: object) -> None:
    """Show fields with the open progress. Any thread may call it."""
    for meter in _open[-1:]:
        meter.advance(0, **fields)


def count_part(part: int, units: int, made: bool) -> None:
    """A part is done: all of its units. made: by this run. Any thread may call it."""
    for meter in _open[-1:]:
        meter.part(part, units, made)


def count_rows(rows: int = 1) -> None:
    """Rows of the current part are done. Any thread may call it."""
    for meter in _open[-1:]:
        meter.within(rows)


def count_tokens(tokens: int, responses: int = 0) -> None:
    """A sampler has generated tokens, and finished so many responses. Any thread may call it."""
    for meter in _open[-1:]:
        meter.sampled(tokens, responses)


class Meter:
    """What is done of a total, and how fast. A lock makes it usable from any thread."""

    def __init__(self, total: int, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.unit, self._clock = total, unit, clock
        self.done = self.found = 0  # found: done by earlier runs
        self.fields: dict[str, object] = {}
        self.began = self._line_at = clock()
        self._tenths = 0
        self._parts: dict[int, int] = {}  # units of finished parts
        self._within = 0  # of the current part
        self._tokens: list[tuple[float, int]] = []  # times, and all tokens until then
        self._generated = 0
        self.lock = threading.RLock()

    def advance(self, count: int = 1, **fields: object) -> None:
        """Count what is done, and show fields until others replace them."""
        with self.lock:
            self.done += count
            self.fields |= fields

    def resume(self, count: int) -> None:
        """Count what earlier runs have done; it does not enter the rate."""
        with self.lock:
            self.done += count
            self.found += count

    def part(self, part: int, units: int, made: bool) -> None:
        """A part is done: all of its units, however many were counted within it."""
        with self.lock:
            if part not in self._parts:
                self._parts[part] = units
                self._within = 0
                self.done = sum(self._parts.values())
                self.found += 0 if made else units

    def within(self, units: int) -> None:
        """Units of the current part are done. Only a meter of rows counts them."""
        with self.lock:
            if self.unit == "rows":
                self._add_within(units)

    def sampled(self, tokens: int, responses: int = 0) -> None:
        """Tokens are generated. Only a meter of responses counts these."""
        with self.lock:
            now = self._clock()
            self._generated += tokens
            self._tokens.append((now, self._generated))
            while len(self._tokens) > 2 and now - self._tokens[1][0] > _RATE_S:
                del self._tokens[0]
            if self.unit == "responses":
                self._add_within(responses)

    def _add_within(self, units: int) -> None:
        self._within += units
        self.done = min(sum(self._parts.values()) + self._within, self.total)

    @property
    def rate(self) -> float | None:
        """Units per second of this run; None before the first."""
        seconds, done = self._clock() - self.began, self.done - self.found
        return done / seconds if done > 0 and seconds > 0 else None

    @property
    def remaining_s(self) -> float | None:
        return None if self.rate is None else max(self.total - self.done, 0) / self.rate

    def notes(self) -> dict[str, object]:
        """The fields to show, with the tokens that were sampled and their rate."""
        with self.lock:
            if not self._tokens:
                return self.fields
            (since, before), (now, after) = self._tokens[0], self._tokens[-1]
            text = f"{_short(self._generated)} tokens"
            if now > since and self._clock() - now < _RATE_S:
                text += f" at {_short((after - before) / (now - since))}/s"
            return {"generated": text} | self.fields

    def words(self) -> list[str]:
        """The state in words: what is done, rate, remaining time, and the fields."""
        with self.lock:
            share = f" ({self.done / self.total:.0%})" if self.total else ""
            words = [f"{self.done:,}/{self.total:,} {self.unit}{share}"]
            if (rate := self.rate) is not None and (remaining := self.remaining_s) is not None:
                words.append(f"{_short(rate)}/s")
                if self.done < self.total:
                    words.append(f"{_clock_time(remaining)} left")
            return words + [f"{key} {value}" for key, value in self.notes().items()]

    def due(self) -> bool:
        """Whether to print a line now: at each tenth, and after 30 s without a line."""
        with self.lock:
            since = self._clock() - self._line_at
            if self._clock() - self.began < _QUIET_S:
                return False
            tenths = self.done * _TENTHS // self.total if self.total else 0
            if not (since >= _LONGEST_S or (tenths > self._tenths and since >= _SHORTEST_S)):
                return False
            self._line_at, self._tenths = self._clock(), tenths
            return True


@contextmanager
def progress_bar(
    name: str, total: int, unit: str = "parts", lines: bool = False
) -> Iterator[Meter]:
    """Progress on standard error. lines: also on a terminal lines, where others log to it."""
    console, meter = Terminal(stderr=True), Meter(total, unit)
    # Of torchrun's processes the first shows it.
    if _silent or is_quiet() or os.environ.get("RANK", "0") != "0":
        shown = nullcontext()
    elif console.is_terminal and not lines:
        shown = _bar(name, meter, console)
    else:
        shown = _lines(name, meter, console)
    with shown:
        _open.append(meter)
        try:
            yield meter
        finally:
            _open.remove(meter)


@contextmanager
def _ticking(tick: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `tick` from a thread all the time."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            tick()

    thread = threading.Thread(target=work, name="progress", daemon=True)
    _ticks.append(tick)
    thread.start()
    try:
        yield
    finally:
        _ticks.remove(tick)
        ended.set()
        thread.join()


@contextmanager
def _bar(name: str, meter: Meter, console: Terminal) -> Iterator[None]:
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        TimeElapsedColumn(Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[words]}", markup=False),
        console=console,
    )
    with progress:
        task = progress.add_task(name, total=meter.total, words="")

        def update() -> None:
            progress.update(task, completed=meter.done, words="  ".join(meter.words()))

        update()
        with _ticking(update, 0.1):
            yield
        update()


@contextmanager
def _lines(name: str, meter: Meter, console: Terminal) -> Iterator[None]:
    def line() -> None:
        if meter.due():
            text = f"trace-opd: {name}: {', '.join(meter.words())}"
            console.print(text, soft_wrap=True, highlight=False)

    with _ticking(line, 0.5):
        yield


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""The kill harness: start a command, SIGKILL it at any moment, start it again, compare the results.

Used by the kill and soak tests and by the short form, tests/pipelines/stages/test_kill_short.py.
"""

import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_opd.pipelines.paid.prices import Price, most_tokens
from trace_opd.tests.pipelines.conftest import PaidServer, completion

CONFIG = str(Path(__file__).parents[2] / "configs" / "micro.yaml")
MARK = "TRACE_OPD_KILL_TEST"
LAUNCHER = Path(__file__).with_name("launcher.py")
_END_S = 30  # time in which a worker notices that its parent was killed


@dataclass
class Run:
    """A started run: its process, its output files, its exit code (negative: ended by a signal)."""

    pid: int
    output: list[str]
    ended: "queue.SimpleQueue[int]"
    code: int | None = None

    def wait(self, timeout_s: float = 300) -> int:
        if self.code is None:
            self.code = self.ended.get(timeout=timeout_s)
        return self.code

    @property
    def err(self) -> str:
        return Path(self.output[1]).read_text()

    @property
    def changes(self) -> int:
        """Number of changes of the store's files so far."""
        return Path(self.output[0]).with_suffix(".n").stat().st_size


class Launcher:
    """Starts commands by forking a process that has imported everything already (launcher.py, or
    another program that serves the same way).
    """

    def __init__(self, folder: Path, program: Path = LAUNCHER, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._mark = folder, uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, program],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", MARK: self._mark, "COLUMNS": "200"}
            | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._started: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ends: dict[int, queue.SimpleQueue[int]] = {}
        self._count = 0
        line = self._lines().readline()
        assert "ready" in line, "the launcher did not start"
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _lines(self) -> Any:
        assert self._process.stdout is not None
        return self._process.stdout

    def _listen(self) -> None:
        for line in self._lines():
            message = json.loads(line)
            if "started" in message:
                self._ends[message["started"]] = queue.SimpleQueue()
                self._started.put(message["started"])
            else:
                self._ends[message["ended"]].put(message["code"])

    def start(
        self,
        *args: object,
        store: Path | None = None,
        die_at: int = 0,
        die_by: int = signal.SIGKILL,
        threads: int = 1,
        **more: object,
    ) -> Run:
        """Start `trace-opd ARGS`.

        store: count the changes below this folder, and send the run the signal `die_by` just before
        the `die_at`-th change. threads: PyTorch's threads. more: `program`, a file to run instead
        of `trace-opd`; `environment`, its variables; `cwd`; what the launcher's `prepare` reads.
        """
        self._count += 1
        output = [str(self._folder / f"{self._count}.{name}") for name in ("out", "err")]
        for path in output:
            Path(path).touch()
        asked = {
            "args": [*map(str, args)] + (["--store", str(store)] if store else []),
            "output": output,
            "store": str(store) if store else None,
            "die_at": die_at,
            "die_by": die_by,
            "threads": threads,
            **more,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        pid = self._started.get(timeout=60)
        return Run(pid, output, self._ends[pid])

    def done(self, *args: object, store: Path | None = None, threads: int = 1) -> Run:
        """Run a command to its end and assert that it succeeds."""
        run = self.start(*args, store=store, threads=threads)
        assert run.wait() == 0, run.err
        return run

    def kill(self, run: Run, workers: bool) -> None:
        """SIGKILL a run's process group. Workers are in sessions of their own: workers=True kills
        them too, False leaves them to notice.
        """
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        for pid in {run.pid, *(self.alive() if workers else ())}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.wait()

    def alive(self) -> set[int]:
        """Live processes that any run has started."""
        found = set()
        mark = f"{MARK}={self._mark}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != self._process.pid:
                with suppress(OSError):
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        found.add(int(folder.name))
        return found

    def assert_nobody_is_left(self) -> None:
        deadline = time.monotonic() + _END_S
        while left := self.alive():
            assert time.monotonic() < deadline, f"processes {left} outlived their run"
            time.sleep(0.02)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._reader.join()


@contextmanager
def launcher(folder: Path, program: Path = LAUNCHER, **environment: str) -> Iterator[Launcher]:
    opened = Launcher(folder, program, **environment)
    try:
        yield opened
    finally:
        opened.close()


@dataclass
class Toll:
    """What a stage survived: kills, starts, rounds and seconds."""

    kills: int = 0
    starts: int = 0
    rounds: int = 0
    seconds: float = 0.0


class Killer:
    """Kills the same command on copies of one store, then runs it to its end."""

    def __init__(self, launcher: Launcher, made: Path, folder: Path, seed: int = 0) -> None:
        """made: a store with the stage's inputs; folder: where its copies go."""
        self._launcher, self._made, self._folder = launcher, made, folder
        self._random = random.Random(seed)
        self.toll = Toll()

    def rounds(self, args: list[str], kills: int, window_s: float) -> Iterator[Path]:
        """Yield stores in which the command finished after kills.

        The kills come at random moments of up to `window_s` after a start; there are at least
        `kills` of them in total. A round's store exists until the next round begins.
        """
        toll, began = self.toll, time.monotonic()
        while toll.kills < kills:
            root = self._folder / f"round-{toll.rounds}"
            shutil.copytree(self._made, root)
            while True:
                run = self._launcher.start(*args, store=root)
                toll.starts += 1
                # After a round's share of kills the command may finish.
                wait_s = self._random.uniform(0, window_s) if toll.kills < kills else 300.0
                try:
                    code = run.wait(wait_s)
                except queue.Empty:
                    self._launcher.kill(run, workers=self._random.random() < 0.5)
                    code = run.wait()
                    toll.kills += code == -signal.SIGKILL
                if code != -signal.SIGKILL:
                    assert code == 0, run.err
                    break
                assert "Traceback" not in run.err, run.err
            self._launcher.assert_nobody_is_left()
            toll.rounds += 1
            toll.seconds = time.monotonic() - began
            yield root
            shutil.rmtree(root)

    def changes(self, args: list[str], step: int = 1) -> Iterator[Path]:
        """Yield stores in which the command was killed just before its n-th change of a file and
        then finished on a second start, for every `step`-th n.
        """
        toll, began, last = self.toll, time.monotonic(), 1
        while True:
            root = self._folder / f"change-{last}"
            shutil.copytree(self._made, root)
            run = self._launcher.start(*args, store=root, die_at=last)
            toll.starts += 1
            if run.wait() == 0:
                shutil.rmtree(root)
                return
            assert run.code == -signal.SIGKILL, run.err
            toll.kills += 1
            self._launcher.done(*args, store=root)
            self._launcher.assert_nobody_is_left()
            toll.starts, toll.rounds = toll.starts + 1, toll.rounds + 1
            toll.seconds = time.monotonic() - began
            yield root
            shutil.rmtree(root)
            last += step


def assert_budget_holds(
    runs: Launcher, server: PaidServer, args: list[str], root: Path, budget_usd: float, kills: int
) -> tuple[int, float]:
    """Kill a paid annotation at random moments until its budget is spent.

    The server bills every answer at its worst case; the sum must stay below the budget.
    args: the command without budget and prices. Returns the kills and the US dollars billed.
    """
    price, chance, done = Price(prompt=1.0, completion=1.0), random.Random(0), 0

    def at_worst_case(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        time.sleep(0.01)
        status, reply = completion(body)
        reply["usage"] = dict(
            zip(("prompt_tokens", "completion_tokens"), most_tokens(body), strict=True)
        )
        return status, reply

    server.answer = at_worst_case
    server.answered.clear()
    args = [
        *args, f"annotator.base_url={server.url}", f"annotator.budget_usd={budget_usd}",
        "annotator.usd_per_million_prompt_tokens=1",
        "annotator.usd_per_million_completion_tokens=1",
    ]  # fmt: skip
    while True:
        asked = len(server.answered)
        run = runs.start(*args, store=root)
        while run.code is None and len(server.answered) == asked and run.ended.empty():
            time.sleep(0.002)
        if done < kills:
            time.sleep(chance.uniform(0, 0.1))
            runs.kill(run, workers=True)
        if run.wait() != -signal.SIGKILL:
            break
        done += 1
    billed_usd = sum(map(price.worst_case_usd, server.answered))
    assert_refused(run, f"the budget of ${budget_usd:g} has no room", "raise annotator.budget_usd")
    assert billed_usd <= budget_usd
    return done, billed_usd


def assert_refused(run: Run, *words: str) -> None:
    """One sentence, exit code 2, no traceback."""
    assert run.wait() == 2, run.err
    (sentence,) = run.err.splitlines()
    assert sentence.startswith("trace-opd: ")
    for word in words:
        assert word in sentence


def _named_lock(root: Path, stage: str) -> bool:
    """True if a process holds the lock of a dataset of the stage and has written its name."""
    for path in root.glob(f".locks/{stage}.*"):
        with suppress(FileNotFoundError):
            if path.stat().st_size:
                return True
    return False


def together(runs: Launcher, args: list[str], root: Path) -> tuple[Run, Run]:
    """Start a command twice on one store; the second while the first is stopped in the middle."""
    first = runs.start(*args, store=root)
    while not _named_lock(root, args[0]):
        assert first.pid in runs.alive(), first.err
        time.sleep(0.001)
    os.killpg(first.pid, signal.SIGSTOP)
    try:
        second = runs.start(*args, store=root)
        deadline = time.monotonic() + 60
        while "waiting for its end" not in second.err:
            assert time.monotonic() < deadline, second.err
            time.sleep(0.01)
        assert f"is being made by process {first.pid}; waiting" in second.err
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    return first, second


REPEATED = [
    "train", CONFIG, "offline.steps=1", "online.steps=4", "online.group_size=16",
    "groups_per_step=1", "checkpoint_every=8",
]  # fmt: skip


def repeat(runs: Launcher, made: Path, folder: Path, times: int) -> Iterator[Path]:
    """Yield stores in which one training ran undisturbed on two threads, each from a copy of
    `made`.

    All responses of a step share a prompt, so both threads add to the gradient of its last state.
    """
    for number in range(times):
        root = Path(shutil.copytree(made, folder / f"again-{number}"))
        runs.done(*REPEATED, store=root, threads=2)
        yield root

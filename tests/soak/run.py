"""The soak: rounds of kills, file faults and endpoint faults over the pipeline, replayed by seed.

    make test-soak SEED=1 MINUTES=20        rounds 0, 1, 2, … of a seed, for 20 minutes
    make test-soak SEED=1 ROUND=7           one round alone

After each run and at the end of each round the invariants (invariants.py) are checked against the
store, the server's log and the folder next to the store. A failed round prints the command that
replays it, and its store is kept.

Replayed exactly: the schedule; the endpoint's answers and the outcome of each attempt; the order of
file calls in single-threaded stages (all stages, except tensorboard's writer and annotate with a
concurrency above 1). Not replayed: the timing of two runs that start at once, and the order of
answers in flight; so a fault at the n-th call may hit another call there. If the endpoint's port is
taken, another port is used, and datasets made with its answers have other ids.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path

from trace_opd.tests.kill.harness import Launcher, launcher
from trace_opd.tests.soak.endpoint import Endpoint, serve
from trace_opd.tests.soak.file_faults import build_shim
from trace_opd.tests.soak.invariants import Broken
from trace_opd.tests.soak.pipeline import Baseline, undisturbed
from trace_opd.tests.soak.schedule import Variant, make_round
from trace_opd.tests.soak.trial import Trial


@dataclass
class Soak:
    """State that the rounds of a seed share. Each variant's undisturbed run is made once."""

    seed: int
    folder: Path
    runs: Launcher
    endpoint: Endpoint
    shim: bool
    toll: Counter[str] = field(default_factory=Counter)
    _baselines: dict[Variant, Baseline] = field(default_factory=dict)

    def play(self, number: int, engine: str | None = None) -> None:
        """Run one round. Raises Broken; the round's folder is kept in that case."""
        planned = make_round(self.seed, number, engine)
        folder = self.folder / f"round-{self.seed}-{number}"
        trial = None
        try:
            baseline = self._baselines.get(planned.variant)
            if baseline is None:
                root = self.folder / f"undisturbed-{len(self._baselines)}"
                shutil.rmtree(root, ignore_errors=True)
                baseline = undisturbed(self.runs, self.endpoint, planned.variant, root)
                self._baselines[planned.variant] = baseline
            trial = Trial(self.runs, self.endpoint, baseline, planned, folder, self.shim)
            trial.play()
        except AssertionError as error:
            raise Broken(
                f"{error}\n{planned.variant}, budget {planned.budget}\n"
                f"replay: make test-soak SEED={self.seed} ROUND={number}\nkept: {folder}"
            ) from error
        finally:
            self.toll += trial.toll if trial is not None else Counter()
        self.toll["rounds"] += 1
        shutil.rmtree(folder)


@contextmanager
def soak(seed: int, folder: Path) -> Iterator[Soak]:
    """Everything that rounds need, in an existing empty folder."""
    # A shell starts background jobs with SIGINT ignored, and the runs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ExitStack() as stack:
        endpoint = stack.enter_context(serve(seed))
        library = build_shim(folder)
        program = Path(__file__).with_name("forks.py")
        preload = {"LD_PRELOAD": str(library)} if library is not None else {}
        runs = stack.enter_context(launcher(folder / "output", program, **preload))
        yield Soak(seed, folder, runs, endpoint, library is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--round", type=int, help="this one alone")
    parser.add_argument("--engine", choices=("rule", "openai"), help="instead of the drawn one")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    numbers: Iterable[int] = takewhile(lambda _: time.monotonic() < end, count())
    folder, broken = Path(tempfile.mkdtemp(prefix="trace-opd-soak-")), 0
    with soak(asked.seed, folder) as opened:
        for number in numbers if asked.round is None else [asked.round]:
            began, before = time.monotonic(), opened.toll.copy()
            try:
                opened.play(number, asked.engine)
                how = "holds"
            except Broken as error:
                broken += 1
                how = f"BROKEN: {error}"
            spent = ", ".join(f"{n} {name}" for name, n in sorted((opened.toll - before).items()))
            print(f"round {number}: {time.monotonic() - began:.1f} s, {spent}: {how}", flush=True)
    total = ", ".join(f"{n} {name}" for name, n in sorted(opened.toll.items()))
    print(f"seed {asked.seed}: {total}, {broken} broken" + ("" if opened.shim else "; no shim"))
    if broken:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

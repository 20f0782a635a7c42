"""One round of the soak, used by run.py: disturb a store, mend it as the messages say, compare."""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from trace_opd.data.store import MANIFEST, Store
from trace_opd.tests.kill.harness import Launcher, Run
from trace_opd.tests.soak import file_faults, invariants
from trace_opd.tests.soak.endpoint import Endpoint
from trace_opd.tests.soak.invariants import Broken
from trace_opd.tests.soak.mend import follow
from trace_opd.tests.soak.pipeline import Baseline, commands
from trace_opd.tests.soak.schedule import Round, Step

_MENDS = 4  # how often the messages are followed before the store counts as stuck
_ENDS = {-signal.SIGKILL: "kills", 0: "good", 2: "refused"}
# A run that one of these faults ends may lose the answers in flight.
_FATAL = ("sigkill", "full", "io", "readonly")


class Trial:
    """A round that runs in a folder: the store, and next to it a folder that must not change."""

    def __init__(
        self,
        runs: Launcher,
        endpoint: Endpoint,
        baseline: Baseline,
        planned: Round,
        folder: Path,
        shim: bool,
    ) -> None:
        """shim: whether runs have shim.c preloaded; without it runs have no file faults."""
        self._runs, self._endpoint, self._baseline, self._shim = runs, endpoint, baseline, shim
        self._round, self._folder = planned, folder
        self._root, self._outside = folder / "store", folder / "outside"
        self._root.mkdir(parents=True)
        file_faults.make_outside(self._outside)
        self._untouched = file_faults.fingerprint(self._outside)
        variant, factor = planned.variant, planned.budget
        self._budget_usd = None if factor is None else factor * baseline.bill_usd
        self._commands = commands(variant, endpoint.url, self._budget_usd)
        self._unlimited = commands(variant, endpoint.url)
        self._rival = [*self._unlimited["annotate"], "annotator.name=rival", "--alias", "rival"]
        self._spoilt: set[str] = set()  # questions whose journalled answers were damaged
        self._rivalled = False
        self.toll: Counter[str] = Counter()
        endpoint.begin(planned.seed, variant.lies)

    def play(self) -> None:
        """Run all steps, then the end. Raises Broken."""
        for number, step in enumerate(self._round.steps):
            self._endpoint.faulty = step.endpoint
            try:
                getattr(self, step.what)(step)
            except Broken as error:
                raise Broken(f"step {number}, {step}: {error}") from error
        self._endpoint.faulty = False
        self._finish()

    # --- the steps ---

    def run(self, step: Step) -> None:
        self._do([lambda: self._start(step)], self._commands[step.stage], self._loss(step))

    def twins(self, step: Step) -> None:
        args = self._commands[step.stage]
        both = [lambda: self._start(step), lambda: self._plain(args)]
        self._do(both, args, self._loss(step))

    def rivals(self, step: Step) -> None:
        if self._budget_usd is not None:
            return  # the log does not say which run sent a request, so it can't be billed to one
        args = self._unlimited["annotate"]
        self._rivalled = True
        self._do([lambda: self._plain(args), lambda: self._plain(self._rival)], args)

    def damage(self, step: Step) -> None:
        path = file_faults.choose(self._root, step.stage, step.at)
        if path is None:
            return
        known, lines = file_faults.listed(self._root), invariants.lines(self._root)
        before = path.read_bytes()
        file_faults.damage(path, step.name, step.where)
        self.toll["damages"] += 1
        self._spoilt |= invariants.questions(lines - invariants.lines(self._root))
        if path not in known or _same(before, path.read_bytes()):
            return
        checked = self._give(["verify-store", "--store", str(self._root)], 1)
        output = Path(checked.output[0]).read_text()
        ref = "/".join(path.relative_to(self._root).parts[:2])
        if ref not in output:
            raise Broken(f"verify-store does not name {ref}, whose {path} is damaged:\n{output}")

    def stale(self, step: Step) -> None:
        ref = self._baseline.refs[step.stage]
        if not (self._root / ref / MANIFEST).exists():
            file_faults.leave_stale(self._root, ref, step.name)
            self.toll["leftovers"] += 1

    def link(self, step: Step) -> None:
        stage, dataset_id = self._baseline.refs[step.stage].split("/")
        path = self._root / step.name.format(stage=stage, id=dataset_id)
        args = self._commands[stage]
        with file_faults.link(path, self._outside, self._folder / "aside"):
            self.toll["links"] += 1
            self._do([lambda: self._plain(args)], args, codes=(0, 1, 2))

    # --- runs, and the invariants after each ---

    def _start(self, step: Step) -> Run:
        """Start the stage's command with the step's fault at the step's moment."""
        args, counts = self._commands[step.stage], self._baseline.counts[step.stage]
        kind, number = file_faults.IN_A_RUN[step.name]
        if step.name in file_faults.SIGNALS and (not self._shim or step.where < 0.3):
            moment = 1 + int(step.at * counts["files"])
            return self._runs.start(*args, store=self._root, die_at=moment, die_by=number)
        calls = counts["reads" if step.name == "unreadable" else "changes"]
        fault = (kind, number, 1 + int(step.at * calls))
        return self._runs.start(*args, store=self._root, fault=fault)

    def _plain(self, args: Sequence[str]) -> Run:
        return self._runs.start(*args, store=self._root)

    def _loss(self, step: Step) -> int:
        """How many answers may arrive and not reach the disk."""
        return self._round.variant.concurrency if step.name in _FATAL else 0

    def _do(
        self,
        starts: Sequence[Callable[[], Run]],
        args: Sequence[str],
        loss: int = 0,
        codes: Collection[int] = invariants.CODES,
    ) -> list[Run]:
        """Start runs at once, wait for them and check the invariants. args: the runs' command."""
        known = set(invariants.journalled(self._root)) - self._spoilt
        log, begin = self._endpoint.log, len(self._endpoint.log)
        started = [start() for start in starts]
        for run in started:
            invariants.ended_with(run, args, codes)
        self._runs.assert_nobody_is_left()
        for run in started:
            self.toll["runs"] += 1
            self.toll[_ENDS.get(run.code or 0, "stops")] += 1
        if file_faults.fingerprint(self._outside) != self._untouched:
            raise Broken(f"{args[0]}: changed {self._outside}, which is not in the store")
        if self._endpoint.strangers:
            raise Broken(f"{args[0]}: followed a redirect and sent a prompt to another origin")
        asked = log[begin:]
        self.toll["requests"] += len(asked)
        invariants.not_paid_again(known, asked, loss)
        invariants.not_lost(self._root, asked, loss)
        if any(word.startswith("annotator.budget_usd") for word in args):
            spoilt = sum(request.usd for request in log if request.key in self._spoilt)
            invariants.within_budget(log[:begin], asked, (self._budget_usd or 0) + spoilt)
        return started

    def _give(self, words: Sequence[str], *codes: int) -> Run:
        """Run a command line without faults to its end. words: the arguments, store included."""
        return self._do([lambda: self._runs.start(*words)], words, codes=codes or invariants.CODES)[
            0
        ]

    # --- the end ---

    def _finish(self) -> None:
        """Run the commands without faults until they succeed, and check that nothing differs."""
        for _ in range(_MENDS):
            if not (output := self._once()):
                break
            self.toll["mends"] += 1
        if output:
            raise Broken(f"stuck, though its messages were followed:\n{output[-3000:]}")
        self._forget_names()
        invariants.as_undisturbed(self._root, self._baseline.root)

    def _once(self) -> str:
        """Check the store, follow the messages, run each command; a failed command's output."""
        check = ["verify-store", "--store", str(self._root)]
        checked = self._give(check, 0, 1, 2)
        if checked.code:
            follow(Path(checked.output[0]).read_text() + checked.err, self._root, self._give)
        for stage, args in self._unlimited.items():
            if stage == "annotate" and self._budget_usd is not None:
                output = self._undisturbed(self._commands[stage])
                if output and "budget" not in output:
                    return output
            if output := self._undisturbed(args):
                return output
        if self._rivalled and (output := self._undisturbed(self._rival)):
            return output
        checked = self._give(check, 0, 1, 2)
        return Path(checked.output[0]).read_text() + checked.err if checked.code else ""

    def _undisturbed(self, args: Sequence[str]) -> str:
        """Run a command without faults; if it is refused, follow and return its output."""
        (run,) = self._do([lambda: self._plain(args)], args, codes=(0, 1, 2))
        if run.code:
            follow(run.err, self._root, self._give)
            return run.err
        return ""

    def _forget_names(self) -> None:
        """Remove what the undisturbed store lacks: the rival's annotations, after a check, and ids
        as names, which verify-store's commands give to unnamed datasets.
        """
        store = Store(self._root)
        names = store.aliases()
        if "rival" in names:
            rival, own = store.get("rival"), store.get("annotations")
            left_out = [*invariants.TIMES, "annotator_name"]
            tables = [some.read().to_pylist() for some in (rival, own)]
            for row in (row for rows in tables for row in rows):
                for name in left_out:
                    row.pop(name, None)
            if tables[0] != tables[1]:
                raise Broken("two annotations of the same rollouts at once hold different rows")
            shutil.rmtree(self._root / rival.ref)
        kept = {
            name: ref for name, ref in names.items() if name != "rival" and not ref.endswith(name)
        }
        store.write_json("aliases.json", kept)


def _same(one: bytes, other: bytes) -> bool:
    """True if two contents are equal, compared as JSON where both are JSON."""
    if one == other:
        return True
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False

"""A stage as data, and the driver that makes its dataset part by part.

pipeline.py calls `Stage.run`, flows.py `Stage.make` with tasks that call `make_part`, and the
import of human labels (compare/human_labels.py) `make_dataset`. One input part makes one output
part, and finished parts are kept. The arguments of `make_part` can be pickled, so threads,
processes and workers on other machines can call it.
"""

import atexit
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ...data.store import Dataset, Draft, Store
from ...schemas.configs import Config, located
from ...schemas.contract import TableContract
from ..progress import count_part, progress_bar
from ..terminal import say, warn


@dataclass(frozen=True)
class Plan:
    """A request with checked inputs.

    semantic: what the dataset id hashes besides the inputs; parts: number of parts; figures: what
    only planning knows, for the manifest's summary; work, unit: the rows or responses of each part,
    which its engine counts as they are done (progress.py).
    """

    config: Any
    inputs: dict[str, Dataset]
    semantic: dict[str, Any]
    parts: int
    figures: dict[str, Any] = field(default_factory=dict)
    work: tuple[int, ...] = ()
    unit: str = "rows"

    def units(self, part: int) -> int:
        """What a part counts for progress."""
        return self.work[part] if self.work else 1


PartMaker = Callable[[int], pa.Table]  # makes the table of a part by its number


def make_dataset(
    target: Draft | Dataset,
    make: Callable[[Draft], Dataset],
    waits: Callable[[str], None] | None = None,
) -> Dataset:
    """Return the dataset of a request; make it unless it is finished.

    target: what `Store.begin` returned. make: makes the draft's missing parts and finishes it; this
    process holds the draft's lock meanwhile (`Draft.locked`). waits: called with a sentence if
    another run holds the lock; the default prints it.
    """
    if isinstance(target, Dataset):
        return target
    with target.locked(waits or print_waiting) as held:
        return held if isinstance(held, Dataset) else make(held)


def print_waiting(holder: str) -> None:
    """Print on standard error which run holds a dataset."""
    warn(f"{holder}; waiting for its end")


def give_name(
    store: Store, name: str, dataset: Dataset, announce: Callable[[str], None] | None = None
) -> None:
    """Set an alias; if it named another dataset, announce both. announce: the default prints."""
    was = store.set_alias(name, dataset)
    if was is not None and was != dataset.ref:
        line = f"{name}: was {was}, is now {dataset.ref}"
        announce(line) if announce else say(line)


@dataclass(frozen=True)
class Stage:
    """A stage that turns parts into parts.

    resolve: finds and checks inputs; raises InputError before any work.
    open: a context in which the plan's engine is open; an engine that pays for answers keeps them
    with the draft.
    summarize: figures for the manifest, from the plan and the digests of the finished parts.
    digest: what `summarize` needs of a part, kept in memory; the default is the part, which is not
    kept but read again.
    summarized: columns that `digest` reads; None: all.
    check: raises InputError if a finished dataset must stop the next stage; the dataset stays.
    measure: further figures, from what the engine keeps with the draft.
    one_process: whether an engine of a config keeps journal, budget and pace in one process, so
        that other workers make no part.
    """

    name: str
    config_type: type[Config]
    contract: TableContract
    resolve: Callable[[Any, Store], Plan]
    open: Callable[[Plan, Draft], AbstractContextManager[PartMaker]]
    summarize: Callable[[Plan, Iterator[Any]], dict[str, Any]]
    summarized: tuple[str, ...] | None = None
    digest: Callable[[pa.Table], Any] | None = None
    check: Callable[[Any, Dataset], None] = lambda config, dataset: None
    measure: Callable[[Plan, Draft], dict[str, Any]] = lambda plan, draft: {}
    one_process: Callable[[Any], bool] = lambda config: False

    def begin(self, config: Config, store: Store) -> tuple[Plan, Draft | Dataset]:
        """Check the request and open its dataset, finished or as a draft."""
        plan = self.resolve(config, store)
        plan = replace(plan, config=located(plan.config))
        target = store.begin(
            self.name, plan.semantic, plan.inputs, self.contract, config.model_dump(mode="json")
        )
        return plan, target

    def make_part(self, plan: Plan, draft: Draft, part: int) -> int:
        """Make one part unless it exists. The engine stays open for the next part.

        Any thread or process may call it. A process has one open engine, which makes one part at a
        time: engines batch inside, and two of them would share the same cores. Another thread may
        write the previous part meanwhile.
        """
        if draft.has_sound_part(part):
            count_part(part, plan.units(part), made=False)
        else:
            with _engine_lock:
                _stop_idle_timer()
                table = _open_engine(self, plan, draft)(part)
                count_part(part, plan.units(part), made=True)
            draft.write_part(part, table)
            if self.digest is not None:
                draft.digests[part] = self.digest(table)
        return part

    def finish(self, plan: Plan, draft: Draft) -> Dataset:
        """Sum up the parts and write the manifest."""
        digests = (self._digest(draft, part) for part in range(plan.parts))
        summary = plan.figures | self.summarize(plan, digests) | self.measure(plan, draft)
        return draft.finish(plan.parts, summary)

    def _digest(self, draft: Draft, part: int) -> Any:
        """What `summarize` needs of a part, from memory if this process made it."""
        if part in draft.digests:
            return draft.digests[part]
        table = draft.read_part(part, self.summarized)
        return table if self.digest is None else self.digest(table)

    def make(
        self,
        config: Config,
        store: Store,
        make_parts: Callable[[Plan, Draft], None],
        waits: Callable[[str], None] | None = None,
    ) -> Dataset:
        """Make the dataset of a request; `make_parts` makes the missing parts, on any worker."""
        plan, target = self.begin(config, store)

        def complete(draft: Draft) -> Dataset:
            try:
                make_parts(plan, draft)
            finally:
                close_engine()
            return self.finish(plan, draft)

        return make_dataset(target, complete, waits)

    @contextmanager
    def progress(
        self, plan: Plan, missing: Sequence[int] | None = None, lines: bool = False
    ) -> Iterator[None]:
        """Progress of the parts that this process makes.

        missing: the parts that `make_part` gets; None: all. lines: see `progress_bar`.
        """
        total = sum(map(plan.units, range(plan.parts)))
        with progress_bar(self.name, total, plan.unit if plan.work else "parts", lines):
            if missing is not None:
                for part in set(range(plan.parts)) - set(missing):
                    count_part(part, plan.units(part), made=False)
            yield

    def run(self, config: Config, store: Store) -> Dataset:
        """Make the dataset in this process, with its progress on standard error."""

        def make_parts(plan: Plan, draft: Draft) -> None:
            with self.progress(plan):
                for part in range(plan.parts):
                    self.make_part(plan, draft, part)

        return self.make(config, store, make_parts)


@dataclass(frozen=True)
class SingleStage:
    """A stage that is not made of parts: training, or a report, which makes no dataset."""

    name: str
    config_type: type[Config]
    run: Callable[[Any, Store], Any]
    check: Callable[[Any, Dataset], None] = lambda config, dataset: None


_engine_lock = threading.Lock()
_engine: tuple[str, PartMaker, ExitStack] | None = None
_idle_timer: threading.Timer | None = None


def _open_engine(stage: Stage, plan: Plan, draft: Draft) -> PartMaker:
    global _engine
    key = draft.files.url(draft.ref)
    if _engine is None or _engine[0] != key:
        close_engine()
        stack = ExitStack()
        _engine = (key, stack.enter_context(stage.open(plan, draft)), stack)
    return _engine[1]


def close_engine() -> None:
    """Close this process's open engine, if any."""
    global _engine
    _stop_idle_timer()
    if _engine is not None:
        _engine[2].close()
        _engine = None


def _stop_idle_timer() -> None:
    global _idle_timer
    if _idle_timer is not None:
        _idle_timer.cancel()
        _idle_timer = None


def close_idle_engine(after_s: float) -> None:
    """Close this process's engine after so many seconds in which no part begins.

    Each call restarts the one timer.
    """
    global _idle_timer

    def close() -> None:
        with _engine_lock:
            if _idle_timer is timer:  # else a part that began meanwhile has stopped it
                close_engine()

    with _engine_lock:
        _stop_idle_timer()
        if _engine is None:
            return
        _idle_timer = timer = threading.Timer(after_s, close)
        timer.daemon = True
        timer.start()


atexit.register(close_engine)

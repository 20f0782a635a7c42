"""What all table stages share: one input part makes one output part, finished parts are kept.

A stage is data: its name, config model, contract, and two functions. `resolve` finds its inputs
and checks everything that can be checked before work begins; `open` builds the engine that turns
one input part into one output part. The same `make_part` serves a plain loop, Prefect tasks on
threads and processes, and workers on other machines: its arguments are a stage's name, a config,
a store's root and a part's number.
"""

import atexit
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ...data.store import Dataset, Draft, Store
from ...schemas.configs import Config
from ...schemas.contract import TableContract
from ..terminal import Terminal


@dataclass(frozen=True)
class Plan:
    """A request whose inputs are found and checked.

    semantic: what the dataset id hashes besides the inputs; parts: how many parts there will be;
    figures: what only planning knows, for the manifest's summary.
    """

    config: Any
    inputs: dict[str, Dataset]
    semantic: dict[str, Any]
    parts: int
    figures: dict[str, Any] = field(default_factory=dict)


class PartMaker(Protocol):
    """The engine of a stage, open: turns part numbers into tables until closed."""

    def __call__(self, part: int) -> pa.Table: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Stage:
    """One stage of the way of the data.

    resolve: finds and checks inputs (raises InputError before any work).
    open: builds the engine for a plan; `draft` tells where it may keep a journal.
    summarize: figures for the manifest, from the plan and the finished parts.
    summarized: the columns that it reads of them; None: all.
    check: raises InputError if a finished dataset should stop what follows; the dataset stays.
    """

    name: str
    config_type: type[Config]
    contract: TableContract
    resolve: Callable[[Any, Store], Plan]
    open: Callable[[Plan, Draft], PartMaker]
    summarize: Callable[[Plan, Iterator[pa.Table]], dict[str, Any]]
    summarized: tuple[str, ...] | None = None
    check: Callable[[Any, Dataset], None] = lambda config, dataset: None

    def begin(self, config: Config, store: Store) -> tuple[Plan, Draft | Dataset]:
        """Check the request and open its dataset, finished or as a draft."""
        plan = self.resolve(config, store)
        target = store.begin(
            self.name, plan.semantic, plan.inputs, self.contract, config.model_dump(mode="json")
        )
        return plan, target

    def make_part(self, plan: Plan, draft: Draft, part: int) -> int:
        """Make one part unless it is there. The engine stays open for the next one.

        Any thread or process may call it. A process holds one open engine, used by one part at a
        time: engines batch inside, and two of them would share the same cores.
        """
        global _parts_begun
        if not draft.has_sound_part(part):
            with _engine_lock:
                _parts_begun += 1
                draft.write_part(part, _open_engine(self, plan, draft)(part))
        return part

    def finish(self, plan: Plan, draft: Draft) -> Dataset:
        """Sum up the parts and write the manifest."""
        tables = (draft.read_part(part, self.summarized) for part in range(plan.parts))
        return draft.finish(plan.parts, plan.figures | self.summarize(plan, tables))

    def run(self, config: Config, store: Store) -> Dataset:
        """The whole stage in this process, with a progress bar on a terminal."""
        plan, target = self.begin(config, store)
        with held(target) as target:
            if isinstance(target, Dataset):
                return target
            try:
                with progress_bar(self.name, plan.parts) as advance:
                    for part in range(plan.parts):
                        self.make_part(plan, target, part)
                        advance()
            finally:
                close_engine()
            return self.finish(plan, target)


def held(
    target: Draft | Dataset, waits: Callable[[str], None] | None = None
) -> AbstractContextManager[Draft | Dataset]:
    """What `Store.begin` gave: a draft is held while this run works on it (`Draft.locked`)."""
    if isinstance(target, Dataset):
        return nullcontext(target)
    return target.locked(waits or _say_waiting)


def _say_waiting(who: str) -> None:
    line = f"trace-opd: {who}; waiting for its end"
    Terminal(stderr=True).print(line, soft_wrap=True, highlight=False)


_engine_lock = threading.Lock()
_engine: tuple[str, PartMaker] | None = None
_parts_begun = 0


def _open_engine(stage: Stage, plan: Plan, draft: Draft) -> PartMaker:
    global _engine
    key = draft.files.url(draft.ref)
    if _engine is None or _engine[0] != key:
        close_engine()
        _engine = (key, stage.open(plan, draft))
    return _engine[1]


def close_engine() -> None:
    """Close this process's open engine, if any."""
    global _engine
    if _engine is not None:
        _engine[1].close()
        _engine = None


def close_idle_engine(after_s: float) -> None:
    """Close this process's engine once no part has begun for so many seconds."""
    begun = _parts_begun

    def close() -> None:
        with _engine_lock:
            if _parts_begun == begun:
                close_engine()

    timer = threading.Timer(after_s, close)
    timer.daemon = True
    timer.start()


atexit.register(close_engine)


_bars: list[Callable[..., None]] = []


def tell(**fields: object) -> None:
    """Show fields beside the open progress bar, between its steps. Any thread may call it."""
    if _bars:
        _bars[-1](0, **fields)


@contextmanager
def progress_bar(name: str, total: int, unit: str = "parts") -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; silent when that is no terminal.

    Yields `advance(count=1, **fields)`; fields are shown beside the bar, where they stay until others
    are.
    """
    console = Terminal(stderr=True)
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task(name, total=total, note="")

        def advance(count: int = 1, **fields: object) -> None:
            progress.update(task, advance=count)
            if fields:
                note = "  ".join(f"{key} {value}" for key, value in fields.items())
                progress.update(task, note=note)

        _bars.append(advance)
        try:
            yield advance
        finally:
            _bars.remove(advance)

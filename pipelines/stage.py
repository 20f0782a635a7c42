"""What all table stages share: one input part makes one output part, finished parts are kept.

A stage is data: its name, config model, contract, and two functions. `resolve` finds its inputs
and checks everything that can be checked before work begins; `open` builds the engine that turns
one input part into one output part. The same `make_part` serves a plain loop, Prefect tasks on
threads and processes, and workers on other machines: its arguments are a stage's name, a config,
a store's root and a part's number.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..data.store import Dataset, Draft, Store
from ..schemas.configs import Config
from ..schemas.tables import TableContract


@dataclass(frozen=True)
class Plan:
    """A request whose inputs are found and checked.

    semantic: what the dataset id hashes besides the inputs; parts: how many parts there will be.
    """

    config: Any
    inputs: dict[str, Dataset]
    semantic: dict[str, Any]
    parts: int


class PartMaker(Protocol):
    """The engine of a stage, open: turns part numbers into tables until closed."""

    def __call__(self, part: int) -> pa.Table: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Stage:
    """One stage of the way of the data.

    resolve: finds and checks inputs (raises InputError before any work).
    open: builds the engine for a plan; `draft` tells where it may keep a journal.
    summarize: figures for the manifest, from the finished dataset's table.
    """

    name: str
    config_type: type[Config]
    contract: TableContract
    resolve: Callable[[Any, Store], Plan]
    open: Callable[[Plan, Draft], PartMaker]
    summarize: Callable[[Iterator[pa.Table]], dict[str, Any]] = field(default=lambda tables: {})

    def begin(self, config: Config, store: Store) -> tuple[Plan, Draft | Dataset]:
        """Check the request and open its dataset, finished or as a draft."""
        plan = self.resolve(config, store)
        target = store.begin(
            self.name, plan.semantic, plan.inputs, self.contract, config.model_dump(mode="json")
        )
        return plan, target

    def make_parts(self, plan: Plan, draft: Draft, parts: list[int]) -> Iterator[int]:
        """Make the listed parts that are not there yet with one engine; yield each when written."""
        pending = [part for part in parts if not draft.has_part(part)]
        yield from (part for part in parts if part not in set(pending))
        if not pending:
            return
        maker = self.open(plan, draft)
        try:
            for part in pending:
                draft.write_part(part, maker(part))
                yield part
        finally:
            maker.close()

    def finish(self, plan: Plan, draft: Draft) -> Dataset:
        """Sum up the parts and write the manifest."""
        listed = {"parts": [{"rows": 0}] * plan.parts, "table": self.contract.name}
        view = Dataset(draft.store, draft.stage, draft.id, listed)
        summary = self.summarize(view.read_part(part) for part in range(plan.parts))
        return draft.finish(plan.parts, summary)

    def run(self, config: Config, store: Store) -> Dataset:
        """The whole stage in this process, with a progress bar on a terminal."""
        plan, target = self.begin(config, store)
        if isinstance(target, Dataset):
            return target
        with progress_bar(self.name, plan.parts) as advance:
            for _ in self.make_parts(plan, target, list(range(plan.parts))):
                advance()
        return self.finish(plan, target)


@contextmanager
def progress_bar(name: str, total: int, unit: str = "parts") -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; silent when that is no terminal.

    Yields `advance(count=1, **fields)`; fields are shown beside the bar.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not Console(stderr=True).is_terminal,
    )
    with progress:
        task = progress.add_task(name, total=total, note="")

        def advance(count: int = 1, **fields: object) -> None:
            note = "  ".join(f"{key} {value}" for key, value in fields.items())
            progress.update(task, advance=count, note=note)

        yield advance

"""Power loss at any moment: visible data is intact, promises hold, and the command resumes."""

import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from trace_opd.data import atomic, locks
from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.paid.journal import Journal
from trace_opd.pipelines.paid.journal_lines import Answered
from trace_opd.tests.data.power import Killed, Record, recorded

PARTS, QUESTIONS = 2, 2


def table(part: int) -> pa.Table:
    return pa.table({"n": list(range(part * 10, part * 10 + 10))})


def command(root: Path, promise: Callable[[str, str], None]) -> None:
    """Two stages with all kinds of files that a store holds, as the command line runs them."""
    store = Store(root)
    problems = stage(store, "problems", {}, promise, lambda *_: None)
    stage(store, "annotate", {"problems": problems}, promise, pay)


def stage(
    store: Store,
    name: str,
    inputs: dict[str, Dataset],
    promise: Callable[[str, str], None],
    work: Callable[[Draft, int, Callable[[str, str], None]], None],
) -> Dataset:
    target = store.begin(name, {"stage": name}, inputs, None)
    if isinstance(target, Draft):
        with target.locked(print) as held:
            target = held if isinstance(held, Dataset) else make(held, promise, work)
    promise("dataset", target.ref)
    store.set_alias(name, target)
    promise("alias", name)
    return target


def make(draft: Draft, promise: Callable[[str, str], None], work: Callable[..., None]) -> Dataset:
    for part in range(PARTS):
        if not draft.has_part(part):
            work(draft, part, promise)
            draft.write_part(part, table(part))
            promise("part", f"{draft.ref}/part-{part:05d}.parquet")
    # A run's files, written as trainers and boards do: without an fsync.
    model = draft.local_path("checkpoints/final")
    (model / "model").write_bytes(b"weights" * 100)
    (draft.local_path() / "metrics.jsonl").write_text('{"step": 0}\n' * 20)
    return draft.finish(PARTS, {}, ["metrics.jsonl", "checkpoints/final/model"])


def pay(draft: Draft, part: int, promise: Callable[[str, str], None]) -> None:
    journal = Journal(draft.local_path("journal"))
    for question in (f"{part}-{n}" for n in range(QUESTIONS)):
        if journal.get(question) is None:
            journal.append([Answered(question, {"answer": question})])
            promise("paid", question)
    journal.close()


def assert_consistent(root: Path, promised: list[tuple[str, str]]) -> None:
    """All that is visible is right, and all that was promised is visible."""
    store = Store(root)
    found = dict(store.entries())
    for ref, dataset in found.items():
        assert isinstance(dataset, Dataset), (ref, dataset)
        for listed in dataset.listed:
            size, digest = store.files.checksum(f"{ref}/{listed['name']}")
            assert (size, digest) == (listed["bytes"], listed["sha256"]), listed
        assert found.keys() >= set(dataset.manifest["inputs"].values())
    aliases = store.aliases()
    assert found.keys() >= set(aliases.values())
    journals = store.files.local_folders("annotate", "journal")
    for kind, what in promised:
        if kind == "dataset":
            assert what in found
        elif kind == "alias":
            assert what in aliases
        elif kind == "part":
            assert (root / what).read_bytes()
        else:
            (folder,) = journals
            assert Journal(folder).get(what) == {"answer": what}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Record:
    folder = tmp_path_factory.mktemp("power")
    with recorded(folder) as record:
        command(folder / "new" / "store", record.promise)
    return record


def assert_survives(record: Record, count: int, seed: int, folder: Path) -> None:
    """The command goes on from whatever a power loss leaves of what it has done so far."""
    for number, (disk, state, promised) in enumerate(record.states(count, seed)):
        disk.write(state, folder / str(number))
        root = folder / str(number) / "new" / "store"
        if root.exists():
            assert_consistent(root, promised)
        else:
            assert promised == []
        again: list[tuple[str, str]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)  # of what is done to the states
            command(root, lambda kind, what, again=again: again.append((kind, what)))
        assert not {what for kind, what in promised if kind == "paid"} & {what for _, what in again}
        assert_consistent(root, [*promised, *again])
        made = list(Store(root).datasets())
        assert [dataset.stage for dataset in made] == ["annotate", "problems"]
        for dataset in made:
            assert dataset.read().equals(pa.concat_tables([table(0), table(1)]))
        assert not [
            path for path in root.rglob("*") if ".tmp-" in path.name or path.name == ".locks"
        ]


def test_after_power_was_lost_at_any_moment_nothing_is_wrong(undisturbed, tmp_path):
    assert_survives(undisturbed, 50, 0, tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_after_a_kill_a_second_run_and_a_power_loss_nothing_is_wrong(
    seed, undisturbed, tmp_path, monkeypatch
):
    calls = sum(not isinstance(event, tuple) for event in undisturbed.events) // 2
    with recorded(tmp_path / "recorded") as record:
        root = tmp_path / "recorded" / "new" / "store"
        record.left = random.Random(seed).randint(1, calls)
        with suppress(Killed):
            command(root, record.promise)
        record.left = None
        locks._let_go()  # as the kernel does for a process that ends
        monkeypatch.setattr(atomic, "_synced", set())  # the second run is another process
        command(root, record.promise)
    assert_survives(record, 6, seed, tmp_path)

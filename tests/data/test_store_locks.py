"""Several processes on one store: locks, aliases, and the leftovers of killed writers."""

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from trace_opd.data.atomic import sweep, sweep_siblings
from trace_opd.data.locks import holder, locked
from trace_opd.data.store import Dataset, Draft, Store

FORK = multiprocessing.get_context("fork")
TABLE = pa.table({"n": [1, 2, 3]})


def begin(root: Path, semantic: dict | None = None) -> Draft:
    target = Store(root).begin("numbers", semantic or {}, {}, None)
    assert isinstance(target, Draft)
    return target


def made(root: Path, semantic: dict | None = None) -> Dataset:
    draft = begin(root, semantic)
    draft.write_part(0, TABLE)
    return draft.finish(1)


def in_process(work: Callable[..., Any], *args: Any) -> Any:
    process = FORK.Process(target=work, args=args)
    process.start()
    return process


def hold(root: Path, name: str, pipe: Any) -> None:
    with locked(root, name):
        pipe.send("holding")
        pipe.recv()


def end(pipe: Any) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        pipe.send("end")


@pytest.fixture
def held(tmp_path):
    """A process that holds the name "x"; it ends when it is killed or gets a message."""
    ours, theirs = FORK.Pipe()
    process = in_process(hold, tmp_path, "x", theirs)
    theirs.close()
    assert ours.recv() == "holding"
    yield process, ours
    end(ours)
    process.join()


def name_many(root: Path, dataset: Dataset, who: int) -> None:
    for n in range(10):
        Store(root).set_alias(f"name-{who}-{n}", dataset)


def test_of_aliases_given_at_once_none_is_lost(tmp_path):
    dataset = made(tmp_path)
    processes = [in_process(name_many, tmp_path, dataset, who) for who in range(4)]
    for process in processes:
        process.join()
    assert len(Store(tmp_path).aliases()) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aliases.json", "numbers"]


def test_a_lock_is_waited_for_and_its_holder_named(tmp_path, held):
    process, pipe = held
    assert holder(tmp_path, "x") == f"process {process.pid}"
    holders: list[str] = []

    def waits(who: str) -> None:
        holders.append(who)
        end(pipe)

    with locked(tmp_path, "x", waits):
        assert holders == [f"process {process.pid}"]
        assert holder(tmp_path, "x") == f"process {os.getpid()}"
    assert holder(tmp_path, "x") is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_may_refuse_to_wait(tmp_path, held):
    def waits(who: str) -> None:
        raise InterruptedError(who)

    with pytest.raises(InterruptedError, match="process"), locked(tmp_path, "x", waits):
        pass
    with locked(tmp_path, "y"):  # another name is another lock
        pass
    assert holder(tmp_path, "x") is not None


def test_a_killed_holder_leaves_no_lock(tmp_path, held):
    process, _ = held
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert holder(tmp_path, "x") is None
    with locked(tmp_path, "y"):
        pass
    assert list(tmp_path.iterdir()) == []  # what it left goes with the next release


def hold_and_fork(root: Path, orphan: Any) -> None:
    with locked(root, "x"):
        child = in_process(time.sleep, 60)
        orphan.value = child.pid
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_that_outlives_its_killed_parent_holds_nothing(tmp_path):
    orphan = FORK.Value("i", 0)
    in_process(hold_and_fork, tmp_path, orphan).join()
    try:
        assert orphan.value
        assert holder(tmp_path, "x") is None
    finally:
        os.kill(orphan.value, signal.SIGKILL)


def count(root: Path, times: int) -> None:
    for _ in range(times):
        with locked(root, "n"):
            file = root / "n"
            file.write_text(str(int(file.read_text()) + 1))


def test_one_at_a_time_has_the_lock_in_threads_and_processes(tmp_path):
    (tmp_path / "n").write_text("0")
    workers: list[Any] = [FORK.Process(target=count, args=(tmp_path, 50)) for _ in range(3)]
    workers += [threading.Thread(target=count, args=(tmp_path, 50)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "n").read_text() == "300"


def make_slowly(root: Path, pipe: Any) -> None:
    with begin(root).locked(print) as draft:
        assert isinstance(draft, Draft)
        draft.write_part(0, TABLE)
        pipe.send("working")
        pipe.recv()
        draft.finish(1)


@pytest.fixture
def first(tmp_path):
    """A run that has written its only part and finishes the dataset when it gets a message."""
    ours, theirs = FORK.Pipe()
    process = in_process(make_slowly, tmp_path, theirs)
    theirs.close()
    assert ours.recv() == "working"
    yield process, ours
    end(ours)
    process.join()


def test_the_second_run_waits_and_finds_what_the_first_made(tmp_path, first):
    process, pipe = first
    holders: list[str] = []

    def waits(who: str) -> None:
        holders.append(who)
        end(pipe)

    with begin(tmp_path).locked(waits) as found:
        assert isinstance(found, Dataset)
        assert found.read().equals(TABLE)
    assert holders == [f"{found.ref} is being made by process {process.pid}"]


def test_the_second_run_goes_on_where_the_first_was_killed(tmp_path, first):
    process, _ = first
    with begin(tmp_path).locked(lambda _: os.kill(process.pid, signal.SIGKILL)) as draft:
        assert isinstance(draft, Draft)
        assert draft.has_part(0)
        draft.finish(1)
    assert not (tmp_path / ".locks").exists()


def test_reading_takes_no_lock(tmp_path):
    dataset = made(tmp_path)
    with Store(tmp_path).files.locked(dataset.ref):
        assert Store(tmp_path).get(dataset.ref).read().equals(TABLE)


def test_a_store_elsewhere_has_no_lock_and_loses_nothing():
    store = Store("memory://no-locks")
    draft = store.begin("numbers", {}, {}, None)
    assert isinstance(draft, Draft)
    with draft.locked(print) as one, draft.locked(print) as other:
        assert isinstance(one, Draft)
        assert isinstance(other, Draft)
        one.write_part(0, TABLE)
        other.write_part(0, TABLE)
        first, second = one.finish(1), other.finish(1)
    assert first.manifest["parts"] == second.manifest["parts"]


# --- what killed writers leave ---


def test_finishing_removes_what_killed_writers_left(tmp_path):
    draft = begin(tmp_path)
    draft.write_part(0, TABLE)
    folder = draft.local_path()
    left = [folder / "part-00001.parquet.tmp-1-2", folder / "batches" / "a.json.tmp-3-4"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    half = draft.local_path("checkpoints/.tmp-step-00004")
    (half / "trainer.pt").write_text("half")
    kept = [folder / "journal.tmp", folder / "notes.tmp-x"]
    for path in kept:
        path.write_text("a user's")
    draft.finish(1)
    assert not any(path.exists() for path in [*left, half])
    assert all(path.exists() for path in kept)


def test_a_living_writers_file_stays(tmp_path):
    living, dead = tmp_path / "page.html.tmp-1-2", tmp_path / "page.html.tmp-1-3"
    dead.write_text("")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep_siblings(tmp_path / "page.html")
        assert [path.name for path in tmp_path.iterdir()] == [living.name]
        sweep(tmp_path)
        assert living.exists()
    sweep(tmp_path)
    assert not living.exists()


def die_naming(root: Path, dataset: Dataset) -> None:
    (root / f"aliases.json.tmp-{os.getpid()}-1").write_text("{")
    with suppress(BaseException), Store(root).files.locked("aliases.json"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_alias_removes_what_a_killed_one_left(tmp_path):
    dataset = made(tmp_path)
    in_process(die_naming, tmp_path, dataset).join()
    assert list(tmp_path.glob("aliases.json.tmp-*"))
    Store(tmp_path).set_alias("one", dataset)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aliases.json", "numbers"]

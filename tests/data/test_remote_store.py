"""A store on S3: moto's server on loopback, writers in other processes, user mistakes."""

import subprocess
import sys
import uuid
from pathlib import Path

import cloudpickle
import fsspec
import pytest

from trace_opd.data.remote import require_reachable
from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.cli import main
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import PROBLEMS


@pytest.fixture
def root(s3_server) -> str:
    return f"s3://bucket/{uuid.uuid4().hex}"


def problem(name: str) -> dict[str, object]:
    return {
        "problem_id": name, "problem": "1 + 1?", "answer": "2", "answer_kind": "math",
        "solution": None, "steps": None, "source": "test", "split": "train",
    }  # fmt: skip


def begun(store: Store) -> Draft:
    draft = store.begin("problems", {"a": 1}, {}, PROBLEMS)
    assert isinstance(draft, Draft)
    return draft


def elsewhere(code: str, *arguments: str) -> None:
    """Runs code in another process, as another machine would."""
    subprocess.run([sys.executable, "-P", "-c", code, *arguments], check=True)


def test_what_another_process_writes_is_seen_at_once(root):
    store = Store(root)
    draft = begun(store)
    assert list(store.datasets()) == []
    assert not draft.has_part(0)
    assert store.aliases() == {}
    draft.write_part(1, PROBLEMS.table([problem("q")]))
    store.files.fs.ls(f"{store.files.base}/{draft.ref}")  # a listing that must not be remembered
    elsewhere(
        "import sys, fsspec\n"
        "fs, base = fsspec.core.url_to_fs(sys.argv[1])\n"
        "fs.pipe_file(f'{base}/{sys.argv[2]}/part-00000.parquet',"
        " fs.cat_file(f'{base}/{sys.argv[2]}/part-00001.parquet'))\n"
        "fs.pipe_file(f'{base}/aliases.json', b'{\"there\": \"problems/1\"}')\n",
        root,
        draft.ref,
    )
    assert draft.has_part(0)
    assert store.aliases() == {"there": "problems/1"}
    assert draft.finish(2).rows == 2
    assert [dataset.ref for dataset in Store(root).datasets()] == [draft.ref]


def test_a_part_is_one_object_and_nothing_else_is_written(root):
    store = Store(root)
    draft = begun(store)
    draft.write_part(0, PROBLEMS.table([problem("p")]))
    assert store.files.fs.find(store.files.base) == [
        f"{store.files.base}/{draft.ref}/part-00000.parquet"
    ]


def test_a_store_travels_to_other_processes(root):
    draft = begun(Store(root))
    there = cloudpickle.loads(cloudpickle.dumps(draft))
    there.write_part(0, PROBLEMS.table([problem("p")]))
    made = draft.finish(1)
    assert cloudpickle.loads(cloudpickle.dumps(made)).read()["problem_id"].to_pylist() == ["p"]


def test_files_of_a_dataset_are_copied_into_the_store_and_fetched_from_it(
    root, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path / "one"))
    draft = Store(root).begin("train", {"a": 1}, {}, None)
    assert isinstance(draft, Draft)
    folder = draft.local_path("checkpoints/final")
    (folder / "part").mkdir()
    (folder / "part" / "weights").write_bytes(b"w" * 1000)
    (folder / "config.json").write_text("{}")
    draft.local_path("checkpoints/step-00001")
    made = draft.finish(0, {}, ["checkpoints/final/config.json", "checkpoints/final/part/weights"])
    assert [file["bytes"] for file in made.manifest["files"]] == [2, 1000]

    monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path / "two"))
    fetched = Store(root).get("train/" + made.id).local_path("checkpoints/final")
    assert fetched.is_relative_to(tmp_path / "two")
    assert (fetched / "part" / "weights").read_bytes() == b"w" * 1000
    assert [path.name for path in fetched.parent.iterdir()] == ["final"]


def test_a_manifest_fetches_nothing_to_a_place_outside(root, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path / "one"))
    draft = Store(root).begin("train", {"a": 1}, {}, None)
    assert isinstance(draft, Draft)
    (draft.local_path("final") / "weights").write_bytes(b"w")
    made = draft.finish(0, {}, ["final/weights"])
    Store(root).files.write(f"{made.ref}/stolen", b"s")
    made.manifest["files"][0]["name"] = "final/../stolen"
    monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path / "two"))
    with pytest.raises(InputError, match=r"final/\.\./stolen leads out of it"):
        made.local_path("final")
    assert not (tmp_path / "two").exists()


def test_stores_do_not_share_a_local_folder(s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path))
    roots = ["s3://bucket/a", "s3://bucket/a/b", "s3://other/a", "memory://bucket/a"]
    assert len({Store(root).files.local_root() for root in roots}) == len(roots)
    assert Store("s3://bucket/a/").files.local_root() == Store("s3://bucket/a").files.local_root()


def test_two_runs_that_share_a_local_folder_wait_for_each_other(root, tmp_path, monkeypatch):
    holders = []

    def refuse(who: str) -> None:
        holders.append(who)
        raise InterruptedError

    monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path))
    with (
        begun(Store(root)).locked(holders.append),
        pytest.raises(InterruptedError),
        begun(Store(root)).locked(refuse),
    ):
        pass
    assert len(holders) == 1


# --- mistakes ---


def run_command(capsys, monkeypatch, *arguments: str) -> str:
    """What a command of the command line that ends with exit code 2 says."""
    monkeypatch.setattr(sys, "argv", ["trace-opd", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_a_missing_bucket_is_an_error_and_not_created(s3_server, capsys, monkeypatch):
    error = run_command(capsys, monkeypatch, "ls", "--store", "s3://typo/store")
    assert (
        error
        == "trace-opd: store s3://typo/store: there is no bucket typo; make it, or name another; "
        "see docs/scaling.md#a-store-on-s3\n"
    )
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        Store("s3://typo/store").files.write("a", b"")
    assert not fsspec.filesystem("s3", use_listings_cache=False).exists("typo")


def test_a_server_that_does_not_answer_is_an_error(s3_server, tmp_path):
    code = (
        "import sys\n"
        "from trace_opd.data.remote import require_reachable\n"
        "from trace_opd.schemas.errors import InputError\n"
        "try: require_reachable('s3://bucket/store')\n"
        "except InputError as error: sys.exit(0 if sys.argv[1] in str(error) else str(error))\n"
    )
    # Of a process of its own: fsspec keeps file systems, and s3fs sessions, by their arguments.
    for change, reason in (
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}, "Could not connect"),
        (
            {"AWS_SECRET_ACCESS_KEY": None, "AWS_ACCESS_KEY_ID": None},
            "Unable to locate credentials",
        ),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("HOME", str(tmp_path))
            for name, value in change.items():
                patch.delenv(name) if value is None else patch.setenv(name, value)
            elsewhere(code, reason)


@pytest.mark.parametrize(
    ("root", "reason"), [("nowhere://a", "Protocol not known"), ("gs://a/b", "install gcsfs")]
)
def test_a_url_that_nothing_opens_is_refused(capsys, monkeypatch, root, reason):
    error = run_command(capsys, monkeypatch, "ls", "--store", root)
    assert error.startswith(f"trace-opd: store {root}: ")
    assert reason in error


def test_a_local_store_is_not_checked_for_reachability(tmp_path):
    require_reachable(str(tmp_path / "nothing"))
    require_reachable("memory://nothing")
    assert list(Path(tmp_path).iterdir()) == []


def test_local_files_of_a_remote_store_need_a_folder(root, monkeypatch):
    monkeypatch.delenv("TRACE_OPD_LOCAL", raising=False)
    with pytest.raises(InputError, match=r"set TRACE_OPD_LOCAL to one that outlives this run"):
        Store(root).begin("train", {}, {}, None).local_path("checkpoints")
    assert isinstance(begun(Store(root)).finish(0), Dataset)

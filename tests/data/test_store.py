"""The store: identity, atomic parts, aliases, references, lineage, other file systems."""

import hashlib
import json
import random
import resource
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.data.manifest import CHECKSUM, manifest_checksum
from trace_opd.data.store import MANIFEST, Dataset, Draft, Store, content_hash
from trace_opd.schemas.configs import PolicyConfig, RolloutConfig
from trace_opd.schemas.contract import VERSION_KEY
from trace_opd.schemas.errors import DamagedFile, InputError
from trace_opd.schemas.tables import PROBLEMS, VERDICTS


def problems_table(*names: str) -> pa.Table:
    return PROBLEMS.table(
        {
            "problem_id": name,
            "problem": f"Problem {name}",
            "answer": "2",
            "answer_kind": "math",
            "solution": None,
            "steps": None,
            "source": "test",
            "split": "train",
        }
        for name in names
    )


def begin(store: Store, semantic: dict, **inputs: Dataset | Draft) -> Draft:
    target = store.begin("problems", semantic, inputs, PROBLEMS)
    assert isinstance(target, Draft)
    return target


def finished(store: Store, semantic: dict, *parts: pa.Table, **inputs: Dataset) -> Dataset:
    draft = begin(store, semantic, **inputs)
    for index, table in enumerate(parts):
        draft.write_part(index, table)
    return draft.finish(len(parts), {"note": "done"})


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# --- identity ---


def test_the_same_request_finds_the_finished_dataset(store):
    made = finished(store, {"a": 1, "b": 2}, problems_table("p"), problems_table("q", "r"))
    again = Store(store.root).begin("problems", {"b": 2, "a": 1}, {}, PROBLEMS)
    assert isinstance(again, Dataset)
    assert again.ref == made.ref
    assert (again.parts, again.rows, again.summary) == (2, 3, {"note": "done"})
    assert again.read()["problem_id"].to_pylist() == ["p", "q", "r"]
    assert again.read(["answer"]).column_names == ["answer"]


def test_another_config_input_stage_or_version_is_another_dataset(store):
    first = finished(store, {"a": 1}, problems_table("p"))
    other = finished(store, {"a": 2}, problems_table("q"))
    ids = {
        first.id,
        other.id,
        begin(store, {"a": 1}, problems=first).id,
        begin(store, {"a": 1}, problems=other).id,
        begin(store, {"a": 1}, rollouts=first).id,
        store.begin("other", {"a": 1}, {}, PROBLEMS).id,
        store.begin("problems", {"a": 1}, {}, None).id,
    }
    assert len(ids) == 7


def test_how_a_stage_runs_is_recorded_but_does_not_matter(store):
    one = RolloutConfig(policy=PolicyConfig(device="cpu"))
    two = RolloutConfig(policy=PolicyConfig(precision="float32"))

    def open_for(config):
        dump = config.model_dump(mode="json")
        return store.begin("rollout", config.semantic(), {}, None, dump)

    draft = open_for(one)
    assert isinstance(draft, Draft)
    draft.finish(0)
    found = open_for(two)
    assert isinstance(found, Dataset)
    assert found.manifest["config"]["policy"]["device"] == "cpu"
    assert isinstance(open_for(RolloutConfig(group_size=3)), Draft)


def test_a_hash_does_not_depend_on_key_order():
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash([1, 2]) != content_hash([2, 1])


def test_the_manifest_can_be_read_without_us(store):
    made = finished(store, {"a": 1}, problems_table("p", "q"))
    with Path(made.path(MANIFEST)).open() as file:
        manifest = json.load(file)
    (part,) = manifest["parts"]
    assert (manifest["table"], manifest["schema_version"]) == ("problems", PROBLEMS.version)
    assert (part["rows"], part["bytes"]) == (2, Path(made.path(part["name"])).stat().st_size)
    assert store.files.checksum(f"{made.ref}/{part['name']}") == (part["bytes"], part["sha256"])
    assert manifest["config"] == {"a": 1}
    assert manifest["packages"]["pyarrow"] == pa.__version__
    assert manifest["started_at"] <= manifest["finished_at"]


def test_the_glob_names_all_parts(store):
    made = finished(store, {"a": 1}, problems_table("p"), problems_table("q"))
    found = sorted(Path(made.path()).glob(Path(made.glob).name))
    assert [pq.read_table(path)["problem_id"].to_pylist() for path in found] == [["p"], ["q"]]


# --- parts ---


def test_a_draft_is_no_dataset_and_goes_on_from_its_parts(store):
    begin(store, {"a": 1}).write_part(1, problems_table("q"))
    assert list(store.datasets()) == []
    resumed = begin(Store(store.root), {"a": 1})
    assert [resumed.has_part(part) for part in range(3)] == [False, True, False]
    assert resumed.read_part(1)["problem_id"].to_pylist() == ["q"]
    resumed.write_part(0, problems_table("p"))
    assert resumed.finish(2).rows == 2


def test_a_part_that_breaks_the_contract_is_not_written(store, tmp_path):
    draft = begin(store, {"a": 1})
    with pytest.raises(InputError, match=r"part-00000\.parquet, row 1: problem_id p appears twice"):
        draft.write_part(0, problems_table("p", "p"))
    assert files(tmp_path) == set()


def test_a_finished_dataset_whose_part_is_gone_says_so(store):
    made = finished(store, {"a": 1}, problems_table("p"), problems_table("q"))
    Path(made.path("part-00001.parquet")).unlink()
    with pytest.raises(
        InputError, match=r"part-00001\.parquet: file is gone; .trace-opd verify-store"
    ):
        made.read()


def test_a_leftover_temporary_file_is_no_part(store):
    draft = begin(store, {"a": 1})
    draft.write_part(0, problems_table("p"))
    folder = Path(store.files.base) / draft.ref
    (folder / "part-00001.parquet.tmp-1-2").write_bytes(b"PAR1 torn")
    assert not draft.has_part(1)
    made = draft.finish(1)
    assert made.rows == 1
    assert list(folder.glob("part-*.parquet")) == [folder / "part-00000.parquet"]


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: flipped(content, 8),  # the first page
        lambda content: flipped(content, 190),  # the page of problem
        lambda content: flipped(content, len(content) - 6),  # the footer's length
        lambda content: content[: len(content) // 2],
        lambda content: bytes(len(content)),
        lambda content: b"",
    ],
    ids=["first page", "later page", "footer", "cut", "zeros", "empty"],
)
def test_a_damaged_part_of_an_unfinished_dataset_is_removed_to_be_made_again(store, damage):
    draft = begin(store, {"a": 1})
    for part, name in enumerate(("p", "q")):
        draft.write_part(part, problems_table(name))
    path = Path(store.files.base) / draft.ref / "part-00001.parquet"
    path.write_bytes(damage(path.read_bytes()))
    resumed = begin(Store(store.root), {"a": 1})
    assert [resumed.has_sound_part(part) for part in range(3)] == [True, False, False]
    assert not path.exists()
    resumed.write_part(1, problems_table("q"))
    assert resumed.finish(2).read()["problem_id"].to_pylist() == ["p", "q"]


def test_each_flipped_byte_of_an_unfinished_part_is_found_or_mended(store):
    draft = begin(store, {"a": 1})
    draft.write_part(0, problems_table("p", "q"))
    path = Path(store.files.base) / draft.ref / "part-00000.parquet"
    content = path.read_bytes()
    for at in random.Random(0).sample(range(len(content)), 150):
        path.write_bytes(flipped(content, at))
        assert not draft.has_sound_part(0) or path.read_bytes() == content


WRITER = """
import itertools, random, sys
import pyarrow as pa
from trace_opd.data.store import Store

draft = Store(sys.argv[1]).begin("noise", {}, {}, None)
# Incompressible, so that a write takes long enough to be hit by a kill.
tables = [
    pa.table({"n": [seed] * 400, "noise": [random.randbytes(10_000) for _ in range(400)]})
    for seed in (1, 2)
]
print("ready", flush=True)
for index in itertools.count():
    draft.write_part(index % 3, tables[index % 2])
"""


def test_a_writer_killed_at_any_moment_leaves_no_torn_part(tmp_path):
    seen, waits = 0, random.Random(0)
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(waits.uniform(0.05, 0.4))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        for part in tmp_path.glob("noise/*/part-*.parquet"):
            table = pq.read_table(part)
            assert table.num_rows == 400
            assert len(set(table["n"].to_pylist())) == 1
            seen += 1
    assert seen
    draft = Store(tmp_path).begin("noise", {}, {}, None)
    assert isinstance(draft, Draft)
    assert draft.has_part(0)


def test_a_kill_between_the_last_part_and_the_manifest_leaves_a_draft(store):
    begin(store, {"a": 1}).write_part(0, problems_table("p"))
    resumed = begin(store, {"a": 1})
    mtime = (Path(store.files.base) / resumed.ref / "part-00000.parquet").stat().st_mtime_ns
    made = resumed.finish(1)
    assert isinstance(store.begin("problems", {"a": 1}, {}, PROBLEMS), Dataset)
    assert Path(made.path("part-00000.parquet")).stat().st_mtime_ns == mtime


# --- references ---


def test_an_alias_names_a_dataset_and_can_move(store):
    first = finished(store, {"a": 1}, problems_table("p"))
    second = finished(store, {"a": 2}, problems_table("q"))
    store.set_alias("train-set", first)
    store.set_alias("other", first)
    store.set_alias("train-set", second)
    assert store.get("train-set").id == second.id
    assert Store(store.root).aliases() == {"train-set": second.ref, "other": first.ref}


@pytest.mark.parametrize("name", ["", "a/b", "-a", "a b", "../up", "a\n"])
def test_a_name_that_is_no_alias_is_refused(store, name):
    made = finished(store, {"a": 1}, problems_table("p"))
    with pytest.raises(InputError, match="use letters, digits"):
        store.set_alias(name, made)
    assert store.aliases() == {}


def test_a_dataset_answers_to_its_id_a_prefix_and_its_ref(store):
    made = finished(store, {"a": 1}, problems_table("p"))
    for ref in (made.id, made.id[:4], made.ref, f"problems/{made.id[:4]}"):
        assert store.get(ref).ref == made.ref


@pytest.mark.parametrize("ref", ["", "nothing", "problems/", "rollout/{id}", "/"])
def test_a_reference_without_a_dataset_points_to_ls(store, ref):
    made = finished(store, {"a": 1}, problems_table("p"))
    with pytest.raises(InputError, match=r"is not in store .*`trace-opd ls` lists"):
        store.get(ref.format(id=made.id))


def test_an_ambiguous_prefix_lists_candidates(store):
    by_first: dict[str, list[Dataset]] = {}
    for n in range(17):  # 16 hexadecimal digits: two ids share their first
        made = finished(store, {"a": n}, problems_table("p"))
        by_first.setdefault(made.id[0], []).append(made)
    first, clashing = next((k, v) for k, v in by_first.items() if len(v) > 1)
    with pytest.raises(InputError, match=r"is ambiguous .*; give more of the id") as error:
        store.get(first)
    assert any(made.ref in str(error.value) for made in clashing)


def test_another_table_is_refused_by_name(store):
    made = finished(store, {"a": 1}, problems_table("p"))
    assert store.get(made.id, PROBLEMS).ref == made.ref
    with pytest.raises(InputError, match="holds problems, this stage needs table verdicts"):
        store.get(made.id, VERDICTS)
    untabled = store.begin("train", {}, {}, None)
    assert isinstance(untabled, Draft)
    with pytest.raises(InputError, match="holds no table, this stage needs table problems"):
        store.get(untabled.finish(0).id, PROBLEMS)


def test_a_table_of_another_schema_version_is_refused(store):
    made = finished(store, {"a": 1}, problems_table("p"))
    path = Path(made.path(MANIFEST))
    manifest = json.loads(path.read_text()) | {"schema_version": PROBLEMS.version + 1}
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"is version 2 of table problems.*; run its stage again"):
        store.get(made.id, PROBLEMS)


def test_a_part_of_another_schema_version_is_refused(store):
    made = finished(store, {"a": 1}, problems_table("p"))
    newer = problems_table("p").replace_schema_metadata({VERSION_KEY: b"7"})
    pq.write_table(newer, made.path("part-00000.parquet"))
    with pytest.raises(InputError, match="is version 7 of table problems"):
        made.read()


# --- lineage ---


def test_lineage_goes_depth_first_to_the_roots_and_names_each_once(store):
    root = finished(store, {"a": 1}, problems_table("p"))
    middle = finished(store, {"a": 2}, problems_table("q"), problems=root)
    leaf = finished(store, {"a": 3}, problems_table("r"), rollouts=middle, problems=root)
    assert [(depth, role, node.id) for depth, role, node in leaf.lineage()] == [
        (0, "", leaf.id),
        (1, "rollouts", middle.id),
        (2, "problems", root.id),
    ]
    assert leaf.input("rollouts").input("problems").id == root.id


def test_datasets_are_listed_by_stage(store):
    made = finished(store, {"a": 1}, problems_table("p"))
    other = store.begin("train", {}, {}, None)
    assert isinstance(other, Draft)
    other.finish(0)
    assert {dataset.ref for dataset in store.datasets()} == {made.ref, other.ref}
    assert [dataset.ref for dataset in store.datasets("problems")] == [made.ref]


# --- where a store may be ---


def test_a_store_lives_on_any_fsspec_file_system():
    store = Store(f"memory://{uuid.uuid4().hex}")
    draft = begin(store, {"a": 1})
    draft.write_part(0, problems_table("p"))
    assert begin(store, {"a": 1}).has_part(0)
    made = draft.finish(1)
    store.set_alias("named", made)
    found = Store(store.root).get("named", PROBLEMS)
    assert found.read()["problem_id"].to_pylist() == ["p"]
    assert isinstance(store.begin("problems", {"a": 1}, {}, PROBLEMS), Dataset)
    assert [dataset.ref for dataset in store.datasets()] == [made.ref]
    assert len(fsspec.open_files(found.glob)) == 1
    assert [path for path in store.files.fs.find(store.files.base) if ".tmp-" in path] == []


def test_local_files_need_a_local_folder(tmp_path):
    with pytest.raises(InputError, match="need a local folder; set TRACE_OPD_LOCAL"):
        begin(Store(f"memory://{uuid.uuid4().hex}"), {"a": 1}).local_path("checkpoints")
    assert begin(Store(tmp_path), {"a": 1}).local_path("checkpoints").is_dir()


def test_a_store_that_cannot_be_written_stops_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"is not a writable folder; pass --store"):
        begin(Store(tmp_path / "file" / "store"), {"a": 1})


def test_asking_for_a_dataset_writes_nothing(store, tmp_path):
    begin(store, {"a": 1})
    assert store.aliases() == {}
    assert list(store.datasets()) == []
    assert files(tmp_path) == set()


# --- disks that are full, clocks that jump, bytes that rot ---


def test_a_full_disk_is_one_sentence_and_work_resumes_when_there_is_room(store):
    draft = begin(store, {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(
            InputError, match=r"part-00000\.parquet: could not be written .*make room"
        ):
            draft.write_part(0, problems_table("p"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(Path(store.files.base)) == set()
    draft.write_part(0, problems_table("p"))
    assert draft.finish(1).rows == 1


def test_a_clock_that_jumps_does_not_make_a_run_long_or_negative(store):
    # The wall clock showed this when the run began, and has been set since.
    for started in ("2099-01-01T00:00:00.000+00:00", "1999-01-01T00:00:00.000+00:00"):
        draft = begin(store, {"started": started})
        draft = replace(draft, header=draft.header | {"started_at": started})
        assert 0 <= draft.finish(0).manifest["seconds"] < 60


def damaged(path: Path, at: int, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[at:]
    else:
        content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "bit"])
def test_a_damaged_part_is_an_error_or_reads_as_written(store, how):
    tables = problems_table(*map(str, range(50)))
    made = finished(store, {"a": 1}, tables)
    path = Path(made.path("part-00000.parquet"))
    intact, found = path.read_bytes(), 0
    for at in range(4, len(intact), 97):
        damaged(path, at, how)
        assert (
            store.files.checksum(f"{made.ref}/{path.name}")[1]
            != made.manifest["parts"][0]["sha256"]
        )
        try:
            # A flipped bit in what the file says about itself may not matter for its rows.
            assert made.read() == tables
        except InputError as error:
            found += isinstance(error, DamagedFile)
        path.write_bytes(intact)
    assert found > 0
    if how == "cut":
        assert found == len(range(4, len(intact), 97))


def test_a_damaged_manifest_is_logged_and_hides_no_other_dataset(store, caplog):
    first = finished(store, {"a": 1}, problems_table("p"))
    second = finished(store, {"a": 2}, problems_table("q"))
    Path(first.path(MANIFEST)).write_text('{"stage": "prob')
    assert [dataset.ref for dataset in store.datasets()] == [second.ref]
    assert "manifest.json: does not hold what was written" in caplog.text
    with pytest.raises(DamagedFile, match="remove it and give the command again"):
        store.begin("problems", {"a": 1}, {}, PROBLEMS)


def test_a_manifest_knows_its_own_checksum(store):
    made = finished(store, {"a": 1}, problems_table("p"))
    found = store.get(made.ref)
    assert found.manifest[CHECKSUM] == manifest_checksum(found.manifest)
    assert found.manifest[CHECKSUM] != manifest_checksum(found.manifest | {"seconds": 99.0})


def test_files_of_a_dataset_are_listed_with_their_checksums(tmp_path):
    draft = begin(Store(tmp_path), {"a": 1})
    (draft.local_path() / "metrics.jsonl").write_text("{}\n")
    made = draft.finish(0, files=["metrics.jsonl"])
    (listed,) = made.listed
    assert (listed["name"], listed["bytes"]) == ("metrics.jsonl", 3)
    assert listed["sha256"] == hashlib.sha256(b"{}\n").hexdigest()

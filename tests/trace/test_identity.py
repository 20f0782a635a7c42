"""The identity of a model folder: which files change it, and the cache of hashes."""

import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from trace_opd.schemas.errors import InputError
from trace_opd.trace import identity
from trace_opd.trace.identity import model_revision
from trace_opd.trace.policy import policy_name

MICRO = Path(__file__).parents[2] / "data" / "micro"
LARGE = 1 << 24  # bytes; hashes of files from this size on are cached


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MICRO, tmp_path / "model"))


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


CHANGES = {
    "chat template": lambda f: rewrite(f / "chat_template.jinja", "<|end|>", "<|user|>"),
    "end-of-text id": lambda f: rewrite(
        f / "generation_config.json", '"eos_token_id": 0', '"eos_token_id": 5'
    ),
    "rope_theta": lambda f: rewrite(f / "config.json", "10000.0", "20000.0"),
    "tokenizer": lambda f: rewrite(f / "tokenizer.json", '"Fuse"', '"Strip"'),
    "tokenizer config": lambda f: rewrite(f / "tokenizer_config.json", "1024", "2048"),
    "a bit amid the weights": lambda f: flip(f / "model.safetensors", 1_000_000),
    "special tokens": lambda f: (f / "special_tokens_map.json").write_text("{}"),
    "merges": lambda f: (f / "merges.txt").write_text("a b"),
    "sentencepiece": lambda f: (f / "tokenizer.model").write_bytes(b"x"),
    "another template": lambda f: _write(f / "additional_chat_templates" / "tool.jinja", "x"),
    "a second shard": lambda f: (f / "model-2.safetensors").write_bytes(b"x"),
    "an adapter": lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"),
}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_file_that_decides_answers_changes_the_identity(folder, change):
    before = model_revision(str(folder))
    change(folder)
    assert model_revision(str(folder)) != before


def test_documents_and_the_folders_place_do_not(folder, tmp_path):
    before = model_revision(str(folder))
    for name in ("README.md", "LICENSE", ".gitattributes", "loss.png"):
        (folder / name).write_text("x")
    os.mkfifo(folder / "pipe.json")
    assert (
        model_revision(str(folder.rename(tmp_path / "elsewhere")))
        == before
        == model_revision(str(MICRO))
    )


def test_python_counts_where_it_runs(folder):
    before = model_revision(str(folder), trust_remote_code=True)
    _write(folder / "layers" / "modeling.py", "x = 1")
    assert model_revision(str(folder)) == before
    assert model_revision(str(folder), trust_remote_code=True) != before


def test_a_shard_in_a_folder_below_counts(folder):
    index = {"weight_map": {"a": "shards/one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write(folder / "shards" / "one.safetensors", "x")
    before = model_revision(str(folder))
    _write(folder / "shards" / "one.safetensors", "y")
    assert model_revision(str(folder)) != before


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, "\ufeff{"])
def test_a_broken_index_is_one_sentence_with_its_name(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: is no index"):
        model_revision(str(folder))


def test_a_path_that_is_no_folder_has_no_identity(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        model_revision("owner/name")


def test_a_snapshot_in_the_hubs_cache_has_the_models_name():
    assert policy_name("/c/models--Qwen--Qwen3-8B/snapshots/" + "a" * 40) == "Qwen3-8B"
    assert policy_name("/models/mine") == "mine"


# --- the cache of hashes ---


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRACE_OPD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weights(folder) -> Path:
    """A file large enough for the cache, last modified a minute ago."""
    file = folder / "model.safetensors"
    with file.open("r+b") as content:
        content.truncate(LARGE)
    return aged(file)


def aged(file: Path, by_s: float = 60) -> Path:
    at = time.time() - by_s
    os.utime(file, (at, at))
    return file


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the large files that were read. A change time can't be set, so the test waits."""
    read = []
    digest = identity.sha256_of

    def counted(file: Path) -> str:
        if file.stat().st_size >= LARGE:
            read.append(file.name)
        return digest(file)

    monkeypatch.setattr(identity, "sha256_of", counted)
    monkeypatch.setattr(identity, "_RACY_NS", 0)
    return read


def test_a_second_run_reads_no_weights_and_a_changed_file_is_read_again(
    folder, weights, cache, reads
):
    first = model_revision(str(folder))
    assert model_revision(str(folder)) == first
    assert reads == ["model.safetensors"]
    times = weights.stat()
    flip(weights, LARGE // 2)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync -t and tar do
    assert model_revision(str(folder)) != first
    assert reads == ["model.safetensors"] * 2


def test_a_file_that_has_just_been_written_is_not_cached(folder, weights, cache):
    os.utime(weights)
    model_revision(str(folder))
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\x00", b"[]", b"{}", b'[[1, 2, 3, 4], "abc"]', b"[" * 100_000]
)
def test_a_damaged_entry_is_read_as_absent_and_written_anew(folder, weights, cache, reads, damage):
    expected = model_revision(str(folder))
    (entry,) = [path for path in cache.rglob("*") if path.is_file()]
    good = entry.read_bytes()
    entry.write_bytes(damage)
    assert model_revision(str(folder)) == expected
    assert entry.read_bytes() == good


def test_an_entry_whose_digest_is_none_is_not_believed(folder, weights, cache, reads):
    expected = model_revision(str(folder))
    (entry,) = [path for path in cache.rglob("*") if path.is_file()]
    entry.write_text(json.dumps([json.loads(entry.read_text())[0], "0" * 63 + "g"]))
    assert model_revision(str(folder)) == expected


def test_a_cache_that_cannot_be_written_costs_time_alone(folder, weights, cache, reads):
    cache.write_text("a file in the folder's place")
    assert model_revision(str(folder)) == model_revision(str(folder))


def _revision(folder: str) -> str:
    identity._RACY_NS = 0
    return model_revision(folder)


def test_two_processes_share_the_cache(folder, weights, cache):
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert len(set(pool.map(_revision, [str(folder)] * 8))) == 1
    (entry,) = [path for path in cache.rglob("*") if path.is_file()]
    with weights.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    assert json.loads(entry.read_text())[1] == digest

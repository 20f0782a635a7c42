"""The vocabulary of a policy is cached by its files' hash, and made again if they or it change."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trace_opd.pipelines.models import MICRO
from trace_opd.schemas.errors import InputError
from trace_opd.trace import vocabulary
from trace_opd.trace.align import byte_table
from trace_opd.trace.policy import load_tokenizer, vocab_fingerprint, vocab_size
from trace_opd.trace.vocabulary import load_vocabulary


@pytest.fixture(name="cache")
def _cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRACE_OPD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vocabularies"


@pytest.fixture(name="folder")
def _folder(tmp_path) -> Path:
    return shutil.copytree(MICRO, tmp_path / "micro")


@pytest.fixture(name="made")
def _made(monkeypatch) -> list[str]:
    """The folders whose vocabulary was made, not read from the cache."""
    folders, make = [], vocabulary._made
    monkeypatch.setattr(
        vocabulary, "_made", lambda path, trust: folders.append(path) or make(path, trust)
    )
    return folders


def test_the_first_one_is_the_tokenizers_and_later_ones_are_the_same(cache, folder, made):
    tokenizer = load_tokenizer(str(folder))
    first, second = load_vocabulary(str(folder)), load_vocabulary(str(folder))
    assert made == [str(folder)]
    assert first.pieces.pieces == second.pieces.pieces == byte_table(tokenizer).pieces
    assert first.fingerprint == second.fingerprint == vocab_fingerprint(tokenizer)
    assert first.size == second.size == vocab_size(str(folder))
    assert any(first.pieces.pieces)


@pytest.mark.parametrize("content", [b"", b"no Arrow", None])
def test_a_damaged_entry_is_made_again(cache, folder, made, content):
    first = load_vocabulary(str(folder))
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert load_vocabulary(str(folder)).pieces.pieces == first.pieces.pieces
    assert len(made) == 2
    assert entry.read_bytes() == whole


def test_other_files_are_another_entry_and_weights_are_not_read(cache, folder, made):
    before = load_vocabulary(str(folder))
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    load_vocabulary(str(folder))
    assert len(made) == 1
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    assert load_vocabulary(str(folder)).size == before.size + 8
    assert len(made) == 2
    assert len([*cache.iterdir()]) == 2


def test_code_of_a_models_own_is_never_cached(cache, folder, made):
    load_vocabulary(str(folder), trust_remote_code=True)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_fault(cache, folder):
    cache.parent.mkdir()
    cache.write_text("a file in the folder's place")
    assert load_vocabulary(str(folder)).size == vocab_size(str(folder))


def test_a_damaged_tokenizer_is_one_sentence(cache, folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json: is no JSON object"):
        load_vocabulary(str(folder))
    assert not cache.exists()


def test_stage_convert_starts_without_torch():
    code = (
        "import sys, trace_opd.pipelines.stages.convert\n"
        "print(*{'torch', 'transformers', 'tokenizers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

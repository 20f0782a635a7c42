"""A checkpoint becomes a model folder: the final model's weights, in any type, or adapters."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trace_opd.pipelines.models import MICRO, resolve_policy
from trace_opd.schemas.configs import LoraConfig, OfflineConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.checkpoint import save_checkpoint, save_model
from trace_opd.trace.export import export_adapters, export_model
from trace_opd.trace.policy import load_policy
from trace_opd.trace.trainer import Trainer

WEIGHTS = "model.safetensors"


def run(folder: Path, lora: LoraConfig | None = None, base: Path = MICRO) -> Path:
    """A checkpoint whose weights differ from the base's; next to it the final model."""
    policy = load_policy(str(base), "cpu", trainable=True, lora=lora)
    trainer = Trainer(policy, TrainConfig(offline=OfflineConfig(steps=2), lora=lora))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.01
    trainer.state.step = 1
    save_model(trainer, folder / "final")
    return save_checkpoint(trainer, folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """Its base is in a folder of its own, which a test may move."""
    root = tmp_path_factory.mktemp("lora")
    base = Path(shutil.copytree(MICRO, root / "base"))
    return run(root / "run", LoraConfig(rank=4), base)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_exported_checkpoint_is_the_final_model(kind, request, tmp_path):
    checkpoint = request.getfixturevalue(kind)
    export_model(checkpoint, tmp_path / "out")
    final = checkpoint.parent / "final"
    for file in (*final.rglob("*.safetensors"), *final.glob("*.json")):
        name = file.relative_to(final)
        assert (tmp_path / "out" / name).read_bytes() == file.read_bytes(), name
    assert load_policy(str(tmp_path / "out"), "cpu").info.revision == load_policy(
        str(final), "cpu"
    ).info.revision  # fmt: skip
    before = AutoModelForCausalLM.from_pretrained(MICRO).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_bfloat16_is_the_final_model_rounded(kind, request, tmp_path):
    checkpoint = request.getfixturevalue(kind)
    export_model(checkpoint, tmp_path / "out", torch.bfloat16)
    exact = load_file(checkpoint.parent / "final" / WEIGHTS)
    rounded = load_file(tmp_path / "out" / WEIGHTS)
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_exported_adapters_load_through_peft_on_the_base(lora, tmp_path):
    peft = pytest.importorskip("peft")
    export_adapters(lora, tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    base = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    merged = load_file(lora.parent / "final" / WEIGHTS)
    weights = adapted.state_dict()
    for name in merged:
        torch.testing.assert_close(weights[name], merged[name], rtol=1e-5, atol=1e-6)


def test_adapters_need_the_base_that_they_were_trained_on(lora, tmp_path):
    base = lora.parents[1] / "base"
    moved = base.rename(tmp_path / "moved")
    try:
        with pytest.raises(InputError, match=r"is not at .*--base"):
            export_model(lora, tmp_path / "out")
        export_model(lora, tmp_path / "out", base=str(moved))
    finally:
        moved.rename(base)
    other = Path(shutil.copytree(MICRO, tmp_path / "other"))
    (other / "generation_config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(InputError, match="another model"):
        export_model(lora, tmp_path / "again", base=str(other))


def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(full, lora, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="has no adapters; leave --adapters out"):
        export_adapters(full, out)
    with pytest.raises(InputError, match="has no adapters; leave --base out"):
        export_model(full, out, base=str(MICRO))
    damaged = Path(shutil.copytree(full, tmp_path / "step-00001"))
    (shard,) = damaged.glob("shards/*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"is damaged .*export another step"):
        export_model(damaged, out)
    old = tmp_path / "old" / "step-00003"
    old.mkdir(parents=True)
    (old / "trainer.safetensors").touch()
    with pytest.raises(InputError, match="older version"):
        export_model(old, out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(InputError, match="is there already; name a new folder"):
        export_model(full, out)
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_as_policy_path_is_refused_with_the_command(kind, request):
    checkpoint = request.getfixturevalue(kind)
    command = f"`trace-opd export model {checkpoint}"
    with pytest.raises(InputError, match=f"not a model folder; .*{command}"):
        resolve_policy(str(checkpoint))

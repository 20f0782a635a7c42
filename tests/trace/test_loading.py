"""Damaged or incomplete model folders: one sentence that names the file, never random weights."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trace_opd.pipelines.training.model_shape import model_shape
from trace_opd.schemas.errors import InputError
from trace_opd.trace.loading import check_model, load_config, load_model, load_tokenizer
from trace_opd.trace.policy import load_policy
from trace_opd.trace.prompt import render_chat

MICRO = Path(__file__).parents[2] / "data" / "micro"
Damage = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MICRO, tmp_path / "model"))


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def setting(name: str, **values: Any) -> Damage:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return damage


def torn(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1_000_000])


NO_JSON = (b"", b"{not", b"[]", b"null", b"3", b"\xff\xfe\x00", b"[" * 100_000)
NO_OBJECT = {
    f"{name} {content[:4]!r}": (write(name, content), name)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for content in NO_JSON
}
CONFIG = {
    "unknown model_type": setting("config.json", model_type="nonesuch"),
    "model_type a list": setting("config.json", model_type=[1]),
    "no model_type": write("config.json", b"{}"),
    "a size a text": setting("config.json", hidden_size="big"),
    "a size negative": setting("config.json", hidden_size=-5),
    "no heads": setting("config.json", num_attention_heads=0),
    "unknown activation": setting("config.json", hidden_act="nonesuch"),
    "unknown rope": setting("config.json", rope_parameters={"rope_type": "zz", "rope_theta": 1.0}),
    "rope_theta a text": setting(
        "config.json", rope_parameters={"rope_type": "default", "rope_theta": "x"}
    ),
    "vocabulary beyond memory": setting("config.json", vocab_size=2**50),
}
TOKENIZER = {
    "no tokenizer.json": remove("tokenizer.json"),
    "tokenizer.json empty": write("tokenizer.json", b"{}"),
    "unknown tokenizer model": setting("tokenizer.json", model={"type": "Nonesuch"}),
    "ids beyond 32 bits": setting(
        "tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 2**70}}
    ),
    "end of text a number": setting("tokenizer_config.json", eos_token=5),
}
WEIGHTS = {
    "torn": torn,
    "absurd header length": write("model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "garbage": write("model.safetensors", struct.pack("<Q", 8) + b"garbage!"),
    "empty": write("model.safetensors", b""),
    "none": remove("model.safetensors"),
}
TENSORS = {
    "missing": (
        tensors(lambda t: {n: w for n, w in t.items() if "layers.1.mlp" not in n}),
        r"lack model\.layers\.1\.mlp\.down_proj\.weight, [^,]+, "
        r"model\.layers\.1\.mlp\.up_proj\.weight;",
    ),
    "foreign prefix": (
        tensors(lambda t: {f"foo.{n}": w for n, w in t.items()}),
        r"lack lm_head\.weight, model\.embed_tokens\.weight, .* and \d+ more",
    ),
    "another model_type": (
        setting("config.json", model_type="llama", architectures=["LlamaForCausalLM"]),
        r"does not know: model\.layers\.0\.self_attn\.k_norm\.weight, .* and 5 more",
    ),
    "shape": (
        tensors(lambda t: {n: w[:-1] if "layers.0.mlp.up" in n else w for n, w in t.items()}),
        r"other shapes .* model\.layers\.0\.mlp\.up_proj\.weight \(511, 128\) for \(512, 128\)",
    ),
    "unexpected": (tensors(lambda t: t | {"extra.w": torch.zeros(3)}), "does not know: extra.w;"),
}


def spoilt(value: float) -> Damage:
    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["model.layers.2.mlp.up_proj.weight"][7, 9] = value
        return weights

    return tensors(change)


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in words), message
    assert "\n" not in message


@pytest.mark.parametrize(("damage", "name"), NO_OBJECT.values(), ids=NO_OBJECT)
def test_a_json_file_that_holds_no_object_is_named(folder, damage, name):
    damage(folder)
    for load in (load_config, load_tokenizer, load_policy, check_model):
        refused(lambda load=load: load(str(folder)), f"{folder}/{name}")


@pytest.mark.parametrize("damage", CONFIG.values(), ids=CONFIG)
def test_a_config_that_makes_no_model_is_named(folder, damage):
    damage(folder)
    refused(lambda: load_model(str(folder), torch.float32), str(folder), "config.json")
    refused(lambda: check_model(str(folder)), str(folder))


def test_a_plan_refuses_the_configs_that_loading_refuses(folder):
    setting("config.json", hidden_act="nonesuch")(folder)
    refused(lambda: model_shape(str(folder)), str(folder), "config.json")


@pytest.mark.parametrize("damage", TOKENIZER.values(), ids=TOKENIZER)
def test_a_tokenizer_that_cannot_be_made_is_named(folder, damage):
    damage(folder)
    refused(lambda: load_tokenizer(str(folder)), str(folder), "tokenizer.json")


@pytest.mark.parametrize("ends", ["x", -1, 1.5, [0, "x"], {}, True])
def test_invalid_end_of_text_ids_are_refused(folder, ends):
    setting("generation_config.json", eos_token_id=ends)(folder)
    refused(lambda: load_policy(str(folder), "cpu"), "generation_config.json", "eos_token_id")


@pytest.mark.parametrize("damage", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_cannot_be_read_are_named(folder, damage):
    damage(folder)
    for load in (load_policy, check_model):
        refused(lambda load=load: load(str(folder)), "model.safetensors")


@pytest.mark.parametrize(("damage", "words"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_the_config_are_named_and_never_drawn_at_random(
    folder, damage, words
):
    damage(folder)
    for load in (load_policy, check_model):
        with pytest.raises(InputError, match=words):
            load(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(folder, value):
    spoilt(value)(folder)
    for load in (load_policy, check_model):
        refused(lambda load=load: load(str(folder)), "model.layers.2.mlp.up_proj.weight holds NaN")


def test_large_weights_whose_sum_overflows_are_finite(folder):
    def large(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["model.layers.2.mlp.up_proj.weight"][:] = torch.finfo(torch.bfloat16).max
        return weights

    tensors(large)(folder)
    load_policy(str(folder), "cpu")


def test_adapters_in_a_folder_with_weights_are_refused(folder):
    write("adapter_config.json", b"{}")(folder)
    refused(lambda: load_policy(str(folder), "cpu"), "adapter_config.json", "merge")


def test_tensors_that_transformers_ignores_may_be_present_or_missing(folder):
    # The tied head: the file may hold it or not.
    tensors(lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})(folder)
    check_model(str(folder))
    assert load_policy(str(folder), "cpu").info.revision


# --- chat templates ---

TEMPLATES = (
    "{% for %}", "{{ raise_exception('no') }}", "{{ a.b.c }}", "{{ 1/0 }}", "{{ 1 + 'a' }}",
    "{% include 'x' %}", "{{ ''.__class__.__mro__ }}", "{{ messages[7].content }}",
)  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_fails_is_one_sentence(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(folder))
    message = [{"role": "user", "content": "1 + 1"}]
    refused(lambda: render_chat(tokenizer, message), str(folder), "chat_template.jinja")


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool.jinja"])
def test_a_chat_template_that_is_no_text_is_named(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\xff\xfe")
    refused(lambda: load_tokenizer(str(folder)), name, "UTF-8")


def test_a_missing_chat_template_is_one_sentence(folder):
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(str(folder))
    refused(lambda: render_chat(tokenizer, []), str(folder), "has no chat template")

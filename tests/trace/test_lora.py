"""LoRA adapters: what trains, in which dtype, and how adapters are saved, restored and merged."""

import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import LoraConfig, SamplingConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.lora import (
    add_teacher,
    load_adapters,
    plain_weights,
    save_adapters,
    transformers_model,
)
from trace_opd.trace.model_folder import write_settings, write_weights
from trace_opd.trace.packing import PackedModel, pack
from trace_opd.trace.policy import backbone, load_policy, output_head
from trace_opd.trace.protocols import Prompt
from trace_opd.trace.ranks import local_tensor
from trace_opd.trace.trainer import Trainer

MICRO = resolve_policy("micro")
LORA = LoraConfig(rank=4, alpha=8.0)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def adapted(lora=LORA, precision="float32", **options):
    pytest.importorskip("peft")
    return load_policy(MICRO, "cpu", precision, trainable=True, lora=lora, **options)


def one_step(policy, lr=0.05):
    """A gradient step that gives the adapters nonzero values."""
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    states = backbone(policy.model)(input_ids=IDS, use_cache=False).last_hidden_state
    weight, bias = output_head(policy.model)
    logits = torch.nn.functional.linear(states, weight, bias)
    logits.float().log_softmax(-1)[0, :-1].gather(-1, IDS[0, 1:, None]).sum().neg().backward()
    with torch.no_grad():
        for parameter in trained:
            parameter -= lr * parameter.grad
            parameter.grad = None


def save_merged(policy, folder):
    write_settings(policy.model, policy.tokenizer, folder)
    write_weights(policy.model, plain_weights(policy.model), folder)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.float()


def test_adapters_train_in_float32_on_a_frozen_base_in_the_compute_precision():
    parameters = dict(adapted(precision="bfloat16").model.named_parameters())
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in parameters.items() if n not in trained} == {torch.bfloat16}
    # rank · (in + out) for each of the seven projections of every layer.
    config = backbone(adapted().model).config
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    per_layer = 2 * (hidden + query) + 2 * (hidden + key) + 3 * (hidden + inner)
    expected = LORA.rank * per_layer * config.num_hidden_layers
    assert sum(p.numel() for p in trained.values()) == expected


def test_fresh_adapters_change_nothing_and_are_the_same_in_every_run():
    torch.manual_seed(1)
    first = adapted().model
    torch.manual_seed(2)
    second = adapted().model
    assert torch.equal(logits(first), logits(load_policy(MICRO, "cpu").model))
    other = second.state_dict()
    assert all(torch.equal(weight, other[name]) for name, weight in first.state_dict().items())


def test_adding_adapters_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    adapted()
    assert torch.equal(torch.rand(2), expected)


def test_adapters_on_their_base_are_identical_again(tmp_path):
    policy = adapted()
    one_step(policy)
    save_adapters(policy.model, tmp_path)
    assert not list(tmp_path.glob("model*.safetensors"))  # the base's weights are not copied
    loaded = load_adapters(load_policy(MICRO, "cpu").model, tmp_path)
    saved = policy.model.state_dict()
    assert all(torch.equal(w, saved[name]) for name, w in loaded.state_dict().items())


def test_adapters_of_another_base_are_refused(tmp_path):
    save_adapters(adapted().model, tmp_path)
    config = AutoConfig.from_pretrained(MICRO)
    config.hidden_size = 64
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="its adapters do not fit"):
        load_adapters(other, tmp_path)


def test_saved_adapters_load_through_peft(tmp_path):
    peft = pytest.importorskip("peft")
    policy = adapted()
    one_step(policy)
    save_adapters(policy.model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(loaded), logits(policy.model))


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_merged_model_loads_in_transformers_and_has_the_adapted_ones_logits(
    precision, tolerance, tmp_path
):
    policy = adapted(precision=precision)
    one_step(policy)
    save_merged(policy, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert merged.dtype == policy.model.dtype
    assert not any("lora" in name for name, _ in merged.named_parameters())
    expected = logits(policy.model)
    torch.testing.assert_close(logits(merged), expected, rtol=tolerance, atol=tolerance)
    base = load_policy(MICRO, "cpu", precision).model
    assert (logits(base) - expected).abs().max() > 10 * tolerance


def test_an_adapted_policy_samples_as_its_merged_model(tmp_path):
    policy = adapted()
    one_step(policy, lr=0.01)
    save_merged(policy, tmp_path)
    prompts = [Prompt([], [5, 6, 7])]
    sampling = SamplingConfig(max_new_tokens=12)
    mine, merged = (
        TransformersPolicySampler(p, 4096).sample(prompts, sampling, [[1, 2]])[0]
        for p in (policy, load_policy(str(tmp_path), "cpu", "float32"))
    )
    assert [c.token_ids for c in mine] == [c.token_ids for c in merged]


def test_the_wrapped_model_gives_the_plain_one_s_decoder_and_head():
    plain, wrapped = load_policy(MICRO, "cpu").model, adapted().model
    assert transformers_model(plain) is plain
    assert backbone(plain) is plain.base_model
    assert type(backbone(wrapped)) is type(backbone(plain))
    assert torch.equal(output_head(wrapped)[0], output_head(plain)[0])
    assert output_head(plain)[1] is None
    assert not output_head(wrapped)[0].requires_grad


@pytest.mark.parametrize(
    ("modules", "what"),
    [(["lm_head", "q_proj"], "lm_head is the head"), (["no_such"], "no_such"),
     (["embed_tokens"], "embed_tokens is no linear layer")],
)  # fmt: skip
def test_target_modules_that_cannot_train_are_refused(modules, what):
    with pytest.raises(InputError, match=what):
        adapted(LoraConfig(target_modules=modules))


def test_without_peft_its_pip_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # find_spec then reports it as not installed
    with pytest.raises(InputError, match="pip install peft"):
        load_policy(MICRO, "cpu", trainable=True, lora=LORA)


def packed_row():
    return pack([[5, 6]], [np.array([7, 8, 9, 10])])


def states_of(model):
    return model(packed_row(), lambda states, head: states.detach().clone())


@pytest.mark.parametrize("sync", ["frozen", "periodic", "ema"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_teacher_is_the_student_with_other_adapters(sync, precision):
    config = {"offline": {"steps": 9}, "teacher": {"sync": sync}, "lora": LORA.model_dump()}
    policy = adapted(precision=precision)
    count = sum(1 for _ in policy.model.parameters())
    trainer = Trainer(policy, TrainConfig.model_validate(config))
    trained = [p for p in trainer.student.parameters() if p.requires_grad]
    teachers = dict(trainer.teacher.named_parameters())
    assert len(teachers) == (0 if sync == "frozen" else len(trained))
    # No copy of the base, and nothing of the teacher's is trained.
    assert sum(1 for _ in trainer.student.parameters()) == count + len(teachers)
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in trained}
    assert not any(p.requires_grad for p in teachers.values())
    base = states_of(trainer.student)  # fresh adapters change nothing
    with torch.no_grad():
        for parameter in trained:
            local_tensor(parameter).add_(0.05)
    moved = states_of(trainer.student)
    assert not torch.equal(moved, base)
    assert torch.equal(states_of(trainer.teacher), base)
    assert torch.equal(states_of(trainer.student), moved)  # the student's adapters are back
    assert [p.requires_grad for p in trained] == [True] * len(trained)
    if sync == "periodic":
        trainer._sync_teacher()
        assert torch.equal(states_of(trainer.teacher), moved)


def test_the_reference_is_the_base():
    config = {"offline": {"steps": 9}, "loss": {"reference_kl": 0.1}, "lora": LORA.model_dump()}
    policy = adapted()
    base = states_of(PackedModel(load_policy(MICRO, "cpu").model))
    trainer = Trainer(policy, TrainConfig.model_validate(config))
    with torch.no_grad():
        for parameter in trainer.student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    assert torch.equal(states_of(trainer.reference), base)


def test_adding_the_teacher_leaves_the_random_state_alone():
    model = adapted().model
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    add_teacher(model)
    assert torch.equal(torch.rand(2), expected)

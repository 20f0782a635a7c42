"""Adapters that engines load as such: against merged weights, and hand-overs that must not pass.

Run by `make test-vllm`.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.probe import Probe
from trace_opd.pipelines.samplers.vllm import VllmPolicySampler
from trace_opd.pipelines.samplers.vllm_servers import VllmServersSampler
from trace_opd.pipelines.samplers.weights import ENGINE_RANKS
from trace_opd.schemas.configs import (
    LoraConfig,
    OpenAISampler,
    PromptConfig,
    SamplingConfig,
    VllmSampler,
)
from trace_opd.schemas.errors import InputError
from trace_opd.trace.lora import AdapterForm, adapter_form
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.prompt import student_prompt
from trace_opd.trace.protocols import Completion
from trace_opd.trace.trained import Trained

MODEL = os.environ.get("VLLM_TEST_MODEL", "smollm2")
CONFIG = VllmSampler(engine="vllm", kv_cache_gib=0.25, max_model_len=1024)
# Nats, float32; see conftest.py.
TOLERANCE = 5e-4
PLAIN = SamplingConfig(max_new_tokens=16)
PROBLEMS = ["4821+3977", "12+99"]
SEEDS = [[10 * i + j for j in range(4)] for i in range(len(PROBLEMS))]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", *MODULES]

pytestmark = pytest.mark.slow


@pytest.fixture
def student() -> Policy:
    """With adapters that change nothing yet."""
    lora = LoraConfig(rank=4, alpha=8)
    return load_policy(resolve_policy(MODEL), "cpu", "float32", trainable=True, lora=lora)


@pytest.fixture
def probe(student: Policy) -> Probe:
    return Probe(student.tokenizer, PromptConfig(), PROBLEMS)


@torch.no_grad()
def train(policy: Policy, scale: float, seed: int) -> None:
    """Move the adapters by noise."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if ".lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def trained(policy: Policy) -> Trained:
    return Trained(policy, PackedModel(policy.model))


@dataclass(frozen=True)
class Late(Trained):
    """A hand-over that gives adapters of before."""

    before: dict[str, torch.Tensor] = field(default_factory=dict)

    def adapters(self) -> dict[str, torch.Tensor] | None:
        return self.before


def form_of(policy: Policy) -> AdapterForm:
    form = adapter_form(policy.model)
    assert form is not None
    return form


def follow(sampler: Any, policy: Trained, probe: Probe) -> None:
    probe.ask(policy)
    sampler.follow(policy, probe)


def sampled(sampler: Any, policy: Policy) -> list[Completion]:
    prompts = [student_prompt(policy.tokenizer, PromptConfig(), text) for text in PROBLEMS]
    return [one for group in sampler.sample(prompts, PLAIN, SEEDS) for one in group]


@torch.no_grad()
def largest_difference(weights: dict[str, torch.Tensor], samples: list[Completion]) -> float:
    """Largest |sampler's − transformers' log-probability| of the samples' tokens under weights."""
    model = AutoModelForCausalLM.from_pretrained(resolve_policy(MODEL), dtype=torch.float32)
    model.load_state_dict(weights)
    worst = 0.0
    for sample in samples:
        assert sample.prompt_token_ids is not None
        assert sample.token_ids is not None
        ids = torch.tensor([sample.prompt_token_ids + sample.token_ids])
        start = len(sample.prompt_token_ids)
        logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        own = logprobs.gather(1, ids[0, start:, None])[:, 0]
        worst = max(worst, (own - torch.tensor(sample.logprobs)).abs().max().item())
    return worst


def check(sampler: Any, student: Policy, probe: Probe) -> None:
    """Two hand-overs, each sampled with as with merged weights; then one of stale adapters."""
    merged: list[dict[str, torch.Tensor]] = []
    for turn in range(2):
        train(student, 0.01, seed=turn)
        merged.append({name: w.clone() for name, w in trained(student).weights()})
        follow(sampler, trained(student), probe)
        samples = sampled(sampler, student)
        assert largest_difference(merged[turn], samples) < TOLERANCE
    assert largest_difference(merged[0], samples) > 10 * TOLERANCE
    before = {name: w.clone() for name, w in (trained(student).adapters() or {}).items()}
    train(student, 1e-3, seed=2)
    late = Late(student, PackedModel(student.model), before)
    with pytest.raises(InputError, match=r"still has old weights|loaded only a part"):
        follow(sampler, late, probe)


@pytest.fixture
def engine(student: Policy) -> Iterator[Callable[..., VllmPolicySampler]]:
    opened: list[VllmPolicySampler] = []

    def open_engine(**options: Any) -> VllmPolicySampler:
        path = resolve_policy(MODEL)
        opened.append(VllmPolicySampler(CONFIG, path, "float32", **options))
        return opened[-1]

    yield open_engine
    for sampler in opened:
        sampler.close()


@pytest.mark.parametrize("in_process", [True, False])
def test_an_engine_loads_each_steps_adapters(
    engine: Callable[..., VllmPolicySampler], student: Policy, probe: Probe, in_process: bool
) -> None:
    sampler = engine(in_process=in_process, adapters=form_of(student))
    check(sampler, student, probe)
    assert len(sampler._llm.llm_engine.list_loras()) == 1  # no older ones


def test_merging_stays_a_choice(
    engine: Callable[..., VllmPolicySampler], student: Policy, probe: Probe
) -> None:
    sampler = engine(in_process=True)
    train(student, 0.01, seed=0)
    follow(sampler, trained(student), probe)
    merged = dict(trained(student).weights())
    assert largest_difference(merged, sampled(sampler, student)) < TOLERANCE


def test_adapters_that_vllm_cannot_load_are_refused(
    engine: Callable[..., VllmPolicySampler], student: Policy, probe: Probe
) -> None:
    """As of a module that vLLM's model does not have."""
    sampler = engine(adapters=form_of(student))
    odd = {"base_model.model.model.odd.lora_A.weight": torch.zeros(4, 8)}
    odd["base_model.model.model.odd.lora_B.weight"] = torch.zeros(8, 4)
    with pytest.raises(InputError, match=r"can't load the adapters .* sampler\.adapters=merge"):
        follow(sampler, Late(student, PackedModel(student.model), odd), probe)


@pytest.fixture(scope="module")
def server(served: Any) -> Any:
    return served.start(*LORA).wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, make_server: Any) -> Iterator[Any]:
    made = make_server(tmp_path_factory.mktemp("served"))
    yield made
    made.kill()


def servers_sampler(server: Any, student: Policy, folder: Path) -> VllmServersSampler:
    config = OpenAISampler(engine="openai", base_url=server.url)
    return VllmServersSampler(config, student.tokenizer, folder, 1.0, adapters=form_of(student))


def test_a_server_loads_each_steps_adapters(
    server: Any, student: Policy, probe: Probe, tmp_path: Path
) -> None:
    sampler = servers_sampler(server, student, tmp_path / "adapters")
    check(sampler, student, probe)
    client = openai.OpenAI(base_url=server.url, api_key="none")
    # The model, and the adapters of the last two hand-overs: the last one was refused.
    assert len(client.models.list().data) == 3
    sampler.close()
    assert not (tmp_path / "adapters").exists()


def test_a_server_that_restarts_unseen_gets_the_adapters_before_it_is_used(
    server: Any, student: Policy, probe: Probe, tmp_path: Path
) -> None:
    sampler = servers_sampler(server, student, tmp_path / "adapters")
    train(student, 0.01, seed=0)
    follow(sampler, trained(student), probe)
    before = sampled(sampler, student)
    server.kill()
    server.start(*LORA).wait()
    assert [row.token_ids for row in sampled(sampler, student)] == [row.token_ids for row in before]
    sampler.close()


def test_servers_that_cannot_load_adapters_are_refused(
    server: Any, student: Policy, probe: Probe, tmp_path: Path
) -> None:
    server.kill()
    server.start().wait()  # without --enable-lora
    sampler = servers_sampler(server, student, tmp_path / "adapters")
    with pytest.raises(InputError, match=r"can't load .* --enable-lora --max-lora-rank 8"):
        follow(sampler, trained(student), probe)
    server.kill()
    server.start(*LORA, updates=False).wait()
    with pytest.raises(InputError, match=r"offers no update of its adapters.*_LORA_UPDATING=1"):
        servers_sampler(server, student, tmp_path / "adapters")


def test_the_ranks_that_engines_take_are_vllms_own() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == ENGINE_RANKS


@pytest.mark.parametrize("adapters", ["load", "merge"])
def test_five_steps_of_adapters_in_process(lab: Any, adapters: str) -> None:
    engine = (
        f"sampler={{engine: vllm, kv_cache_gib: 0.25, max_model_len: 1024, adapters: {adapters}}}"
    )
    lab.ended(lab.train(engine, "seed=7", "lora={rank: 4}", "optim.lr=1.0e-3"))
    lab.check([0] * lab.steps)

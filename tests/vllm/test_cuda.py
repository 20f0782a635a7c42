"""An engine that shares one GPU with its trainer and sleeps while the trainer works.

    python -m pytest -s tests/vllm/test_cuda.py

Prints the GPU memory in use. Needs CUDA; skipped without it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.probe import Probe
from trace_opd.pipelines.samplers.vllm import VllmPolicySampler
from trace_opd.schemas.configs import PromptConfig, SamplingConfig, VllmSampler
from trace_opd.schemas.errors import InputError
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.prompt import student_prompt
from trace_opd.trace.trained import Trained

SHARE = 0.3  # the engine's share of the GPU's memory
ENGINE = f"sampler={{engine: vllm, gpu_memory_utilization: {SHARE}, max_model_len: 1024}}"
# Mean |difference| of log-probabilities in nats: two implementations in bfloat16.
TOLERANCE = 0.05
PROBLEMS = ["4821+3977", "12+99"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def used_gib() -> float:
    """GPU memory in use by all processes, in GiB."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


@torch.no_grad()
def mean_difference(policy: Policy, prompt: list[int], completion: Any) -> float:
    """Mean |engine's − trainer's log-probability| over a sample's tokens, in nats."""
    ids = torch.tensor([prompt + completion.token_ids], device=policy.device)
    logits = policy.model(ids).logits[0, len(prompt) - 1 : -1]
    own = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return (own.cpu() - torch.tensor(completion.logprobs)).abs().mean().item()


@pytest.fixture(scope="module")
def student(lab: Any) -> Policy:
    return load_policy(resolve_policy(lab.model), "cuda", "bfloat16")


@pytest.fixture(scope="module")
def engine(lab: Any) -> Iterator[VllmPolicySampler]:
    config = VllmSampler(engine="vllm", gpu_memory_utilization=SHARE, max_model_len=1024)
    path = resolve_policy(lab.model)
    sampler = VllmPolicySampler(config, path, "bfloat16", in_process=True, sleeps=True)
    yield sampler
    sampler.rest()  # the state at the end of a run
    sampler.close()


def test_a_sleeping_engine_gives_its_memory_back_and_wakes_with_the_trainers_weights(
    engine: VllmPolicySampler, student: Policy, perturb: Any
) -> None:
    probe = Probe(student.tokenizer, PromptConfig(), PROBLEMS)
    prompts = [student_prompt(student.tokenizer, PromptConfig(), text) for text in PROBLEMS]
    trained = Trained(student, PackedModel(student.model))
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    for turn in range(3):
        perturb(student, 1e-3)
        probe.ask(trained)
        phases: list[str] = []
        engine.follow(trained, probe, phases.append)
        wake = ["wake"] if turn else []  # the weights' memory first, then the cache's
        assert phases == [*wake, "hand_over", *wake, "probe"]
        seeds = [[10 * i + j for j in range(4)] for i in range(len(PROBLEMS))]
        groups = engine.sample(prompts, SamplingConfig(max_new_tokens=32), seeds)
        for prompt, group in zip(prompts, groups, strict=True):
            assert prompt.token_ids is not None
            for completion in group:
                difference = mean_difference(student, prompt.token_ids, completion)
                assert difference < TOLERANCE, turn
        awake = used_gib()
        engine.rest()
        asleep = used_gib()
        print(f"turn {turn}: {awake:.1f} GiB awake, {asleep:.1f} GiB asleep")
        assert awake - asleep > 0.8 * SHARE * total


def test_an_engine_that_woke_without_its_weights_never_samples(
    engine: VllmPolicySampler, student: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(student.tokenizer, PromptConfig(), PROBLEMS)
    trained = Trained(student, PackedModel(student.model))
    probe.ask(trained)
    engine.rest()
    monkeypatch.setattr(engine, "_load", lambda policy: None)
    with pytest.raises(InputError, match="its log-probabilities differ"):
        engine.follow(trained, probe)


@pytest.mark.parametrize("staleness", [0, 1])
def test_five_steps_on_one_gpu(lab: Any, staleness: int) -> None:
    """First in the trainer's process, where the engine sleeps; then in its own, one step ahead."""
    ahead = f"online.max_staleness={staleness}"
    lab.ended(lab.train(ENGINE, "policy.precision=bfloat16", "seed=1", ahead))
    metrics = lab.metrics()
    assert [line["staleness"] for line in metrics] == [0] + [staleness] * (lab.steps - 1)
    assert all(line["peak_memory_gib_train"] > 0 for line in metrics)
    assert all(line["tokens_per_second_per_gpu"] > 0 for line in metrics)
    assert all(("seconds_sleep" in line) == (not staleness) for line in metrics)
    assert lab.table("rollouts").rows == lab.rollouts
    for line in metrics:
        assert line["sampler_drift"] < TOLERANCE, line

"""The probe that an engine has the trainer's weights; a copy of the micro policy is the engine."""

import copy

import pytest
import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.probe import Probe
from trace_opd.schemas.configs import PromptConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.trained import Trained

ROUNDING = 1e-6  # nats: rounding differences of engines in float32


@pytest.fixture(scope="module")
def base() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu", "float32")


@pytest.fixture
def probe(base: Policy) -> Probe:
    return Probe(base.tokenizer, PromptConfig(), ["4821+3977", "12+99"])


def trained(policy: Policy) -> Trained:
    return Trained(policy, PackedModel(policy.model))


def moved(policy: Policy, scale: float, seed: int = 0, only: str = "") -> Policy:
    """A copy with changed weights: those whose names contain `only`."""
    model = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return Policy(model, policy.tokenizer, policy.info)


@torch.no_grad()
def says(policy: Policy, probe: Probe, seed: int) -> list[list[float]]:
    """An engine's scores: the policy's, with the engine's rounding."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for ids in probe.token_ids:
        logits = policy.model(torch.tensor([ids])).logits[0, :-1]
        scores = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        rows.append((scores + ROUNDING * torch.randn(scores.shape, generator=generator)).tolist())
    return rows


def test_an_engine_that_follows_passes_at_every_step(base: Policy, probe: Probe) -> None:
    student = base
    for step in range(4):
        probe.ask(trained(student))
        assert probe.check("engine", says(student, probe, step)) < 1e-5
        student = moved(student, 3e-6, seed=step)


def test_an_engine_that_keeps_its_weights_is_refused(base: Policy, probe: Probe) -> None:
    probe.ask(trained(base))
    probe.check("engine", says(base, probe, 0))
    probe.ask(trained(moved(base, 1e-5)))
    with pytest.raises(InputError, match=r"engine: still has old weights: .* -?0% of"):
        probe.check("engine", says(base, probe, 1))


def test_changes_too_small_to_judge_add_up_until_they_can_be(base: Policy, probe: Probe) -> None:
    students = [base]
    for step in range(50):
        students.append(moved(students[-1], 3e-8, seed=step))

    def check(steps: range) -> None:
        for step in steps:
            probe.ask(trained(students[step]))
            probe.check("engine", says(base, probe, step))

    check(range(2))
    with pytest.raises(InputError, match="old weights"):
        check(range(2, 50))


def test_an_engine_that_takes_over_a_part_alone_is_refused(base: Policy, probe: Probe) -> None:
    probe.ask(trained(base))
    probe.check("engine", says(base, probe, 0))
    student = moved(base, 3e-3)
    half = moved(base, 3e-3, only="layers")  # the embedding and the tied head stay unchanged
    probe.ask(trained(student))
    with pytest.raises(InputError, match="loaded only a part"):
        probe.check("engine", says(half, probe, 1))


def test_another_model_or_precision_is_refused_at_first(base: Policy, probe: Probe) -> None:
    probe.ask(trained(base))
    with pytest.raises(InputError, match=r"engine: its log-probabilities differ .* serve policy"):
        probe.check("engine", says(moved(base, 1e-2), probe, 0))
    with pytest.raises(InputError, match="differ"):
        probe.check("engine", [[float("nan")] * (len(ids) - 1) for ids in probe.token_ids])


def test_servers_are_judged_each_by_itself(base: Policy, probe: Probe) -> None:
    probe.ask(trained(base))
    for engine in ("one", "other"):
        probe.check(engine, says(base, probe, 0))
    student = moved(base, 1e-5)
    probe.ask(trained(student))
    probe.check("one", says(student, probe, 1))
    with pytest.raises(InputError, match=r"^other: still"):
        probe.check("other", says(base, probe, 2))

"""The YAML files in configs/: each loads, and the configs of the paper have its settings.

Only configs that are on-policy from step 0 claim the paper's settings; the offline-first ones have
its constants.
"""

import re
from pathlib import Path

import pytest

from trace_opd.pipelines.samplers.engine import require_ratios
from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import KlClip, Route
from trace_opd.schemas.settings import load_config

FOLDER = Path(__file__).parents[2] / "configs"
FILES = [*sorted(FOLDER.glob("*.yaml")), FOLDER.parent / "examples" / "own-data" / "run.yaml"]
ON_POLICY = {
    "qwen3-8b": ("Qwen/Qwen3-8B", Route.FKL, Route.GRPO),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", Route.GRPO, Route.RKL),
}
PAPER = ON_POLICY | {f"{name}-offline-first": values for name, values in ON_POLICY.items()}


def load(name):
    return load_config(PipelineConfig, FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_config_loads(file):
    config = load_config(PipelineConfig, file)
    train = config.train
    assert train.policy.path == config.evaluate.policy.path
    assert train.prompt == config.evaluate.prompt
    if train.offline.steps:
        policies = (config.rollout.policy, config.convert.policy)
        assert {policy.path for policy in policies} == {train.policy.path}
        assert config.convert.routing == train.online.routing
        assert config.rollout.prompt == train.prompt
        assert config.rollout.sampling == train.online.sampling
        assert train.offline.steps - 1 <= train.offline.max_staleness


@pytest.mark.parametrize("name", PAPER)
def test_what_the_paper_gives(name):
    config, (path, key, error) = load(name), PAPER[name]
    train, routing = config.train, config.train.online.routing
    assert (train.offline.steps == 0) is (name in ON_POLICY)
    assert train.policy.path == path
    assert (routing.key, routing.error, routing.alpha) == (key, error, 0.25)
    assert (routing.rule, routing.teacher_context) == ("spans", "type")
    schedule = train.schedule
    assert (schedule.w0, schedule.hold_steps, schedule.decay_steps) == (0.5, 10, 30)
    assert (train.teacher.sync, train.teacher.sync_steps) == ("periodic", 10)
    loss = train.loss
    assert (loss.clip_low, loss.clip_high, loss.reference_kl) == (0.2, 0.28, 0.0)
    assert (loss.kl_clip, loss.kl_clip_value) == (KlClip.ENTRY_ABOVE, 0.05)
    assert config.problems.source.preset == "openthoughts-math"
    assert config.problems.limit == 30_000
    assert train.prompt.thinking
    evaluation = config.evaluate
    assert evaluation.k == 8
    assert (evaluation.sampling.temperature, evaluation.sampling.top_p) == (0.6, 0.95)
    assert evaluation.sampling.top_k == 20
    assert train.sampler.engine == config.evaluate.sampler.engine == "vllm"


@pytest.mark.parametrize("name", ON_POLICY)
def test_the_twin_without_a_clip_differs_in_the_clip_alone(name):
    paper, twin = load(name), load(f"{name}-no-clip")
    assert twin.train.loss.kl_clip == KlClip.NONE
    loss = paper.train.loss.model_copy(update={"kl_clip": KlClip.NONE})
    train = paper.train.model_copy(update={"loss": loss})
    assert paper.model_copy(update={"name": f"{name}-no-clip", "train": train}) == twin


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_a_config_on_policy_from_step_0_is_called_the_paper_s(file):
    claims = re.search("as in the paper|the paper's settings", file.read_text())
    train = load_config(PipelineConfig, file).train
    assert bool(claims) is (file.stem in ON_POLICY)
    assert not claims or train.offline.steps == 0


@pytest.mark.parametrize("name", PAPER)
def test_responses_are_as_long_as_thinking_takes_and_fit_into_the_context(name):
    config = load(name)
    limits = [config.train.online.sampling.max_new_tokens, config.evaluate.sampling.max_new_tokens]
    assert limits == [16_384, 38_912]
    for sampler in (config.train.sampler, config.evaluate.sampler):
        assert max(limits) + 2_000 <= sampler.max_model_len  # pyright: ignore - vLLM


@pytest.mark.parametrize("name", PAPER)
def test_the_engine_can_give_the_log_probabilities_that_the_ratio_needs(name):
    """vLLM reports log-probabilities after truncation, so training rollouts are not truncated."""
    require_ratios(load(name).train.online.sampling)


def test_a_pipeline_with_offline_steps_needs_an_annotator():
    with pytest.raises(InputError, match=r"annotate is missing, and train\.offline\.steps is 3"):
        load_config(PipelineConfig, FOLDER / "qwen3-8b.yaml", ["train.offline.steps=3"])

"""The YAML files in configs/: each loads, and the configs of the paper have its settings."""

from pathlib import Path

import pytest

from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.labels import KlClip, Route
from trace_opd.schemas.settings import load_config

FOLDER = Path(__file__).parents[2] / "configs"
FILES = [*sorted(FOLDER.glob("*.yaml")), FOLDER.parent / "examples" / "own-data" / "run.yaml"]
PAPER = {
    "qwen3-8b": ("Qwen/Qwen3-8B", Route.FKL, Route.GRPO),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", Route.GRPO, Route.RKL),
}


def load(name):
    return load_config(PipelineConfig, FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_config_loads(file):
    config = load_config(PipelineConfig, file)
    policies = (config.rollout.policy, config.convert.policy, config.train.policy)
    assert {policy.path for policy in policies} == {config.evaluate.policy.path}
    assert config.train.online.routing == config.convert.routing
    assert config.train.prompt == config.rollout.prompt == config.evaluate.prompt
    assert config.train.offline.steps - 1 <= config.train.offline.max_staleness


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_settings(name):
    config, (path, key, error) = load(name), PAPER[name]
    train, routing = config.train, config.convert.routing
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
    assert config.rollout.sampler.engine == evaluation.sampler.engine == "vllm"


@pytest.mark.parametrize("name", PAPER)
def test_the_engine_can_give_the_log_probabilities_that_the_ratio_needs(name):
    """vLLM reports log-probabilities after truncation, so training rollouts are not truncated."""
    config = load(name)
    for sampling in (config.rollout.sampling, config.train.online.sampling):
        assert (sampling.top_p, sampling.top_k) == (1.0, 0)
    for stage in (config.rollout, config.evaluate):
        assert stage.sampling.max_new_tokens < stage.sampler.max_model_len

"""The registry of sampling engines: one per config tag, and what each answers for itself."""

import pytest
from pydantic import TypeAdapter

from trace_opd.pipelines.samplers import sampling_engine
from trace_opd.schemas.configs import PolicyConfig, Sampler
from trace_opd.schemas.configs.rollout import NamedSampler
from trace_opd.schemas.errors import InputError

CONFIGS = {
    "transformers": {"batch_tokens": 999},
    "openai": {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "NO_SUCH_KEY"},
    "vllm": {"max_model_len": 123},
}
TAGS = TypeAdapter(NamedSampler).json_schema()["discriminator"]["mapping"]
POLICY = PolicyConfig(path="micro")


def engine(tag: str):
    return sampling_engine(
        TypeAdapter(Sampler).validate_python({"engine": tag} | CONFIGS[tag]), POLICY
    )


@pytest.mark.parametrize("tag", TAGS)
def test_every_tag_has_an_engine_that_answers_for_itself(tag):
    found = engine(tag)
    assert type(found).__module__.endswith(f".samplers.{tag}")
    assert (found.served, found.follows) == (tag == "openai", tag != "transformers")
    assert found.batch_tokens == (999 if tag == "transformers" else None)


def test_contexts_are_the_models_or_the_configs_or_the_servers_own():
    assert engine("vllm").context() == 123
    assert engine("openai").context() is None
    assert engine("transformers").context() == 1024


def test_the_same_files_have_one_identity_and_a_server_is_known_by_its_address(monkeypatch):
    assert engine("vllm").identity() == engine("transformers").identity()
    with pytest.raises(InputError, match="NO_SUCH_KEY is not set"):
        engine("openai").identity()
    monkeypatch.setenv("NO_SUCH_KEY", "a key")
    assert engine("openai").identity() == ["http://127.0.0.1:9/v1", "micro"]

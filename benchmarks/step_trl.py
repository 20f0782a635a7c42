"""TRL 1.16's GRPOTrainer, one optimiser step per turn: the peer in step.py.

step.py runs it in its own process. Everything is TRL's code, from dataloader to optimiser. Without
generation the case provides the rollouts through TRL's hook (`rollout_func`). A turn lasts from
TRL's callback `on_step_begin` to `on_step_end`. It includes padding, decoding and rewarding the
rollouts, as ours includes making sequences; logging is excluded.
"""

import math
import os
from tempfile import TemporaryDirectory
from typing import Any

import torch
from step_case import (
    BETA1,
    BETA2,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Case,
    padded_rows,
    reward,
)
from step_turns import Mode, Turns
from transformers import AutoModelForCausalLM, TrainerCallback

from trace_opd.trace.align import byte_table
from trace_opd.trace.policy import load_tokenizer
from trace_opd.trace.prompt import student_messages

# TRL's dataset repeats the case's prompts, so that no epoch ends in a turn.
PASSES = 64


class TakesTurns(TrainerCallback):
    """Makes TRL's training loop wait for its turn before each step."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.mode: Mode = "warm-up"
        self.tokens = 0
        self.grad_norm = math.nan

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        _, self.mode = self._turns.next()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.begin()

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        # Only where the turn's time does not count.
        if self.mode == "warm-up":
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients).item()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._turns.end(self.tokens, self.grad_norm)
        _, self.mode = self._turns.next()


def trl_grpo(case: Case, turns: Turns, micro_batch_tokens: int, recompute: bool) -> None:
    """Take turns until the process is terminated.

    recompute: compute all layers' activations again in the backward pass.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is experimental
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(case.path)
    shortened, rollouts = case.shortened(byte_table(tokenizer)), case.rollouts
    taking = TakesTurns(turns)
    rows = padded_rows(case, micro_batch_tokens)

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        taking.tokens = sum(map(len, completion_ids))
        return [reward(ids) for ids in completion_ids]

    def given(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """The case's rollouts for the prompts that TRL would sample from."""
        table = shortened if taking.mode == "warm-up" else rollouts
        prompt_ids = table["prompt_token_ids"].to_pylist()
        if trainer._tokenize_prompts(prompts)[0] != prompt_ids:
            raise SystemExit("TRL's prompts are not those of the case's rollouts")
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": table["token_ids"].to_pylist(),
            "logprobs": table["logprobs"].to_pylist(),
        }

    class Trainer(GRPOTrainer):
        """Samples itself in turns that include generation."""

        def _generate(self, prompts: list[Any]) -> Any:
            self.rollout_func = None if taking.mode == "generation" else given
            return super()._generate(prompts)

    asked = [student_messages(case.prompt, text) for text in case.problems["problem"].to_pylist()]
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            # In float32 even where autocast computes in bfloat16.
            model=AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32),
            reward_funcs=rewards,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=case.device == "cpu",
                bf16=case.device == "cuda",
                gradient_checkpointing=recompute,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=len(rollouts) // rows,
                max_steps=PASSES,
                shuffle_dataset=False,
                num_generations=case.group_size,
                max_completion_length=case.sampling.max_new_tokens,
                temperature=case.sampling.temperature,
                num_iterations=1,
                beta=0.0,
                loss_type="grpo",
                scale_rewards="group",
                epsilon=CLIP_LOW,
                epsilon_high=CLIP_HIGH,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                adam_beta1=BETA1,
                adam_beta2=BETA2,
                weight_decay=0.0,
                max_grad_norm=MAX_GRAD_NORM,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": asked * PASSES}),
            processing_class=tokenizer,
            callbacks=[taking],
            rollout_func=given,
        )
        trainer.train()

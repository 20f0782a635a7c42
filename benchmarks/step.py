"""Seconds and memory of one optimiser step: our GRPO, TRACE, and TRL's GRPOTrainer.

    make bench-step

One model, the same rollouts, AdamW, float32 on CPU (on CUDA float32 weights under bfloat16
autocast). TRACE runs with λ at its full weight and α = 25 % of every response routed, FKL where it is
right and RKL where it is wrong; `--error none` leaves wrong responses to GRPO (TRACE-FKL). Once
without generation, on rollouts made ahead, and once with it, by each trainer's own sampler over
transformers; those rollouts differ, so the table has their tokens. TRL is left out where it is not
installed: pip install 'trace-opd[peers]'.

Each implementation has a process of its own, and they take turns, so that a drift of the machine
meets all. Seconds are the median of the repetitions. Memory is the largest of them: the peak within
a step beyond what the process holds before it (weights, the optimiser's states, the teacher's weights:
`resident_mib`), from the resident set's high-water mark on CPU (Linux), the allocator's on CUDA.
Prints a table, and what the teacher's forward passes alone take, and writes
benchmarks/results/step.json.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from loss import processor
from rich.console import Console
from rich.table import Table
from step_case import (
    BETA1,
    BETA2,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Case,
    Measured,
    Mode,
    Turns,
)

from trace_opd.data.store import Store
from trace_opd.pipelines.micro import STUDENT_TEMPLATE, TEACHER_TEMPLATE
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.rollout import rollouts_table
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.pipelines.stages import run_stage
from trace_opd.schemas.configs import (
    LossConfig,
    OfflineConfig,
    OptimConfig,
    ProblemsConfig,
    PromptConfig,
    RoutingConfig,
    SamplingConfig,
    ScheduleConfig,
    TrainConfig,
)
from trace_opd.schemas.labels import Action
from trace_opd.trace.align import byte_table
from trace_opd.trace.batch import TrainingSequence, micro_batches, teacher_row, training_sequences
from trace_opd.trace.fused import Head
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.trainer import Trainer

ROOT = Path(__file__).parents[1]
IMPLEMENTATIONS = ("ours_grpo", "ours_trace", "trl_grpo")
# Problems of each model, and a prompt under which the lengths of its responses differ.
MODELS: dict[str, tuple[dict[str, Any], PromptConfig]] = {
    "smollm2": (
        {"kind": "word-problems", "steps": 2},
        PromptConfig(student="{problem} Answer in one short sentence."),
    ),
    "micro": (
        {"kind": "arithmetic"},
        PromptConfig(student=STUDENT_TEMPLATE, teacher=TEACHER_TEMPLATE),
    ),
}
HEAD_ROWS = 512  # of the logits that the teacher alone forms at once


def ours(case: Case, turns: Turns, micro_batch_tokens: int, with_teacher: bool) -> None:
    """Take turns until the process is ended."""
    policy = case.policy()
    config = TrainConfig(
        prompt=case.prompt,
        offline=OfflineConfig(steps=1),
        schedule=ScheduleConfig(w0=0.5 if with_teacher else 0.0, decay_steps=None),
        loss=LossConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        optim=OptimConfig(
            lr=LEARNING_RATE, beta1=BETA1, beta2=BETA2, max_grad_norm=MAX_GRAD_NORM
        ),
        micro_batch_tokens=micro_batch_tokens,
    )
    trainer = Trainer(policy, config)
    sampler = TransformersPolicySampler(policy, config.sampler.batch_tokens)
    table = byte_table(policy.tokenizer)
    for seed in count(1):
        mode = turns.next()
        rollouts = case.shortened(table) if mode == "warm-up" else case.rollouts
        routed = case.routed(rollouts, table, with_teacher)
        turns.begin()
        if mode == "generation":
            rollouts = rollouts_table(
                case.problems, sampler, policy.tokenizer, case.prompt, case.sampling,
                case.group_size, seed,
            )  # fmt: skip
            routed = case.routed(rollouts, table, with_teacher)
        sequences = training_sequences(routed, policy.tokenizer, case.prompt, with_teacher)
        if mode == "teacher":
            teacher_alone(trainer.student, sequences, micro_batch_tokens)
        else:
            trainer.train_step(sequences)
        turns.end(sum(len(sequence.token_ids) for sequence in sequences))


@torch.no_grad()
def teacher_alone(model: PackedModel, sequences: list[TrainingSequence], max_tokens: int) -> None:
    """What TRACE needs of its teacher and no more: states of truncated rows, logits at routed
    tokens."""

    def logits(states: torch.Tensor, head: Head) -> None:
        for piece in states.split(HEAD_ROWS):
            torch.nn.functional.linear(piece, head.weight.to(piece.dtype), head.bias)

    for rows in micro_batches(sequences, max_tokens):
        if (row := teacher_row(rows)) is not None:
            model(row, logits)


def step_process(name: str, case: Case, options: argparse.Namespace, pipe: Connection) -> None:
    turns = Turns(pipe, case.device)
    if name == "trl_grpo":
        from step_trl import trl_grpo

        trl_grpo(case, turns, options.trl_micro_batches)
    else:
        ours(case, turns, options.micro_batch_tokens, with_teacher=name == "ours_trace")


def make_case(options: argparse.Namespace, device: str) -> Case:
    """Sample the rollouts that all train on."""
    source, prompt = MODELS[options.model]
    path = resolve_policy(options.model)
    with TemporaryDirectory() as folder:
        asked = ProblemsConfig.model_validate({"source": source, "limit": options.groups})
        problems = run_stage("problems", asked, Store(folder)).read()
    routing = RoutingConfig(alpha=0.25, key=Action.FKL, error=Action(options.error))
    sampling = SamplingConfig(max_new_tokens=options.max_new_tokens)
    case = Case(
        path, device, prompt, sampling, routing, options.group_size, problems, problems.slice(0, 0)
    )
    policy = case.policy()
    sampler = TransformersPolicySampler(policy, TrainConfig.model_fields["sampler"].default.batch_tokens)
    return case

"""Our trainer, one optimiser step per turn: step.py's rows of `ours_`, see METHODS."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import numpy as np
import pyarrow as pa
import torch
from step_case import (
    BETA1,
    BETA2,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Case,
)
from step_turns import Turns

from trace_opd.pipelines.training.fitting import settled, usable_bytes
from trace_opd.pipelines.training.plan import predict_memory
from trace_opd.pipelines.training.plan_setting import Setting, setting
from trace_opd.schemas.configs import (
    LossConfig,
    OfflineConfig,
    OnlineConfig,
    OptimConfig,
    PolicyConfig,
    RoutingConfig,
    ScheduleConfig,
    TrainConfig,
)
from trace_opd.schemas.settings import override
from trace_opd.trace.align import byte_table
from trace_opd.trace.batches import contrast_rows, micro_batches, taught_rows
from trace_opd.trace.losses import Head
from trace_opd.trace.model_flops import model_flops
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import load_policy
from trace_opd.trace.sequences import (
    TrainingSequence,
    contrast_row,
    teacher_row,
    training_sequences,
)
from trace_opd.trace.trained import Trained
from trace_opd.trace.trainer import Trainer

HEAD_ROWS = 512  # rows of logits at once in the teacher's forward passes
MIB = 1 << 20
WITHOUT_CUDNN = "attention=flash"
# What each row routes; None: plain GRPO without a teacher. {}: the case's own, TRACE.
_ALL = {"rule": "all", "key": "reweight", "error": "reweight", "teacher_context": "peer"}
METHODS: dict[str, dict[str, str] | None] = {
    "ours_grpo": None,
    "ours_trace": {},
    # A correct response of the group as context of all tokens, and a wrong one for comparison.
    "ours_rlsd": _ALL,
    "ours_rlcsd": _ALL | {"contrast_context": "wrong_peer"},
}


def ours(
    cases: list[Case],
    turns: Turns,
    micro_batch_tokens: int,
    method: str,
    overrides: list[str],
) -> None:
    """Take turns until the process is terminated. method: of METHODS; overrides: of TrainConfig,
    and WITHOUT_CUDNN.

    Raises:
        InputError: TrainConfig has no such field.
    """
    if WITHOUT_CUDNN in overrides:
        overrides.remove(WITHOUT_CUDNN)
        leave_out_cudnn()
    routing, with_teacher = METHODS[method], METHODS[method] is not None
    if routing:
        cases = [replace(case, routing=RoutingConfig.model_validate(routing)) for case in cases]
    config = configured(cases[0], micro_batch_tokens, with_teacher, overrides)
    settings = [plan_setting(config, case) for case in cases]
    longest = max(settings, key=lambda where: where.row_tokens)
    config = settled(longest, usable_bytes()).config
    policy = load_policy(
        config.policy.path,
        config.policy.device,
        trainable=True,
        gradient_checkpointing=config.gradient_checkpointing,  # type: ignore[arg-type] - settled
    )
    flops = model_flops(policy.model)
    trainer = Trainer(policy, config)
    table = byte_table(policy.tokenizer)
    scored = Trained(policy, trainer.student).logprobs
    if cases[0].lengths != "sampled":
        cases = [replace(case, rollouts=with_logprobs(case.rollouts, scored)) for case in cases]
    predicted = [predict_memory(replace(where, config=config)).peak / MIB for where in settings]
    for seed in count(1):
        index, mode = turns.next()
        case = cases[index]
        rollouts = case.shortened(table) if mode == "warm-up" else case.rollouts
        routed = case.routed(rollouts, table, with_teacher)
        turns.begin()
        if mode == "generation":
            routed = case.routed(case.sample(policy, seed), table, with_teacher)
        sequences = training_sequences(routed, policy.tokenizer, case.prompt, with_teacher)
        tokens = sum(len(sequence.token_ids) for sequence in sequences)
        if mode == "teacher":
            assert trainer.teacher is not None
            teacher_alone(trainer.teacher, sequences, micro_batch_tokens)
            turns.end(tokens)
        else:
            norm = trainer.train_step(sequences)["grad_norm"]
            # With online steps the plan's peak may be that of sampling.
            plans = predicted[index] if config.offline.steps else None
            turns.end(tokens, norm, flops and flops.step(sequences), plans)


def leave_out_cudnn() -> None:
    """Packed attention takes FlashAttention where it would take cuDNN's."""
    from torch.nn.attention import SDPBackend

    from trace_opd.trace import attention

    attention._KERNELS.remove(SDPBackend.CUDNN_ATTENTION)


def configured(
    case: Case, micro_batch_tokens: int, with_teacher: bool, overrides: list[str]
) -> TrainConfig:
    config = TrainConfig(
        policy=PolicyConfig(path=case.path, device="cuda" if case.device == "cuda" else "cpu"),
        prompt=case.prompt,
        offline=OfflineConfig(steps=1),
        online=OnlineConfig(group_size=max(2, case.group_size)),
        schedule=ScheduleConfig(w0=0.5 if with_teacher else 0.0, decay_steps=None),
        loss=LossConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        optim=OptimConfig(lr=LEARNING_RATE, beta1=BETA1, beta2=BETA2, max_grad_norm=MAX_GRAD_NORM),
        micro_batch_tokens=micro_batch_tokens,
    )
    if "loss.fp32_logits=true" in overrides:  # the config wants an engine with such a head as well
        overrides = [*overrides, "offline.steps=0", "online.steps=1", "sampler={engine: vllm}"]
    return override(config, overrides)


def plan_setting(config: TrainConfig, case: Case) -> Setting:
    """What `trace-opd plan` is asked for a case."""
    prompt, response = (
        max(map(len, case.rollouts[name].to_pylist())) for name in ("prompt_token_ids", "token_ids")
    )
    groups = config.model_copy(update={"groups_per_step": len(case.problems)})
    return setting(groups, None, prompt, response)


def with_logprobs(
    rollouts: pa.Table, scored: Callable[[list[list[int]]], list[np.ndarray]]
) -> pa.Table:
    """Rollouts of random ids with the policy's own log-probabilities, for ratios of about 1."""
    prompts, responses = (rollouts[name].to_pylist() for name in ("prompt_token_ids", "token_ids"))
    # A row at a time, as long rows at once need more memory than a step.
    found = [
        scored([[*prompt, *response]])[0][-len(response) :].astype(np.float32)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    index = rollouts.schema.get_field_index("logprobs")
    field = rollouts.schema.field(index)
    return rollouts.set_column(index, field, pa.array(found, field.type))


@torch.no_grad()
def teacher_alone(
    teacher: PackedModel, sequences: list[TrainingSequence], micro_batch_tokens: int
) -> None:
    """The minimum of every step with a teacher: the backbone up to each last routed token, the
    head at routed tokens, and the same under each contrast.
    """

    def logits(states: torch.Tensor, head: Head) -> None:
        for piece in states.split(HEAD_ROWS):
            torch.nn.functional.linear(piece, head.weight.to(piece.dtype), head.bias)

    for rows in micro_batches(sequences, micro_batch_tokens):
        for taught in taught_rows(rows, micro_batch_tokens):
            teacher(teacher_row(taught), logits)
        for compared in contrast_rows(rows, micro_batch_tokens):
            teacher(contrast_row(compared), logits)

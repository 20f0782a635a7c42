"""The routed loss of one of TRL's micro-batches: from its tensors to packed rows and the loss.

trl.py calls `weighted_rows` and `objective`. Imports no trl.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..schemas.configs import LossConfig, ScheduleConfig
from ..trace.batches import MicroBatch, contrast_rows, taught_rows
from ..trace.fused import routed_loss, token_logprobs
from ..trace.losses import Head, LossInputs, LossOutput
from ..trace.packing import PackedModel
from ..trace.schedule import grpo_weight
from ..trace.sequences import TrainingSequence, loss_inputs, student_row
from ..trace.teaching import contrast_logprobs, teacher_states

SEQUENCES = "trace_sequences"  # key of a TRL batch: TrainingSequence | None a completion
# Where a batch has the sampling policy's log-probabilities: a rollout_func's, or those that TRL
# computes when batches are reused. Without either the policy has not changed since.
_SAMPLED = ("sampling_per_token_logps", "old_per_token_logps")


@dataclass(frozen=True)
class Rows:
    """A micro-batch's routed sequences, equal prompts together.

    weights: one a sequence; reference: (tokens,) float32 of TRL's reference model, or None;
    sampled: whether `logprobs` of the sequences are the sampling policy's.
    """

    sequences: list[TrainingSequence]
    weights: list[float]
    reference: torch.Tensor | None
    sampled: bool


def weighted_rows(inputs: Mapping[str, Any], weight: Callable[[int, list[int]], float]) -> Rows:
    """The completions of a batch that have a verdict and a token that counts, with TRL's
    advantages.

    weight: of a completion's tokens, given their number and that of every completion.
    """
    lengths = inputs["completion_mask"].sum(1).tolist()
    advantages = inputs["advantages"].tolist()
    old = next((inputs[name] for name in _SAMPLED if inputs.get(name) is not None), None)
    reference = inputs.get("ref_per_token_logps")
    found: list[tuple[TrainingSequence, float, torch.Tensor | None]] = []
    for at, sequence in enumerate(inputs[SEQUENCES]):
        tokens = lengths[at]
        if sequence is None or not tokens:
            continue
        changed: dict[str, Any] = {"advantage": advantages[at]}
        if old is not None:
            changed["logprobs"] = old[at, :tokens].float().cpu().numpy()
        theirs = None if reference is None else reference[at, :tokens]
        found.append((replace(sequence, **changed), weight(tokens, lengths), theirs))
    found.sort(key=lambda one: one[0].prompt_ids)
    references = [theirs for _, _, theirs in found if theirs is not None]
    return Rows(
        [sequence for sequence, _, _ in found],
        [weight for _, weight, _ in found],
        torch.cat(references).float() if references else None,
        old is not None,
    )


def trl_weight(args: Any, steps: float, generated: float) -> Callable[[int, list[int]], float]:
    """Weight of a completion's tokens in TRL's loss of a micro-batch, by GRPOConfig.loss_type.

    steps: of gradient accumulation; generated: tokens of the generation batch a micro-batch.
    """
    longest = args.max_completion_length

    def weight(tokens: int, lengths: list[int]) -> float:
        if args.loss_type in ("dapo", "cispo"):
            return 1 / (max(generated, 1.0) * steps)
        if args.loss_type == "bnpo":
            return 1 / (max(sum(lengths), 1) * steps)
        if args.loss_type == "dr_grpo":
            return 1 / (len(lengths) * longest * steps)
        return 1 / (len(lengths) * max(tokens, 1) * steps)

    return weight


@dataclass(frozen=True)
class RoutedLoss:
    """What stays the same over a training. dtype: of the states in the loss."""

    student: PackedModel
    config: LossConfig
    schedule: ScheduleConfig
    teacher_temperature: float | None
    teacher_row_tokens: int
    device: torch.device
    dtype: torch.dtype

    def __call__(
        self, rows: Rows, kl: float, teacher: PackedModel | None
    ) -> tuple[LossOutput, LossInputs]:
        """The loss of a micro-batch at this λ, and its inputs. Runs in the caller's autocast."""
        config, heat, most = self.config, self.teacher_temperature, self.teacher_row_tokens
        inputs = loss_inputs(rows.sequences, rows.weights, self.device, config)
        inputs = replace(inputs, reference_logprobs=rows.reference)
        taught = taught_rows(rows.sequences, most) if kl else []
        states, head = None, None
        if taught:
            assert teacher is not None, "λ > 0 needs a teacher"
            contrasts = contrast_rows(rows.sequences, most)
            batch = MicroBatch(
                rows.sequences, False, taught, len(taught), contrasts, len(contrasts)
            )
            states, head = teacher_states(teacher, batch)
            contrast = contrast_logprobs(teacher, batch, inputs, heat, config.fp32_logits)
            inputs = replace(inputs, contrast_logprobs=contrast)
            states = None if states is None else states.to(self.dtype)
        fade = grpo_weight(kl, self.schedule)

        def use(hidden: torch.Tensor, own_head: Head) -> LossOutput:
            # The loss chooses its own types.
            with torch.autocast(hidden.device.type, enabled=False):
                hidden, known = hidden.to(self.dtype), inputs
                if not rows.sampled:
                    ids, heats = inputs.token_ids, inputs.temperature
                    own = token_logprobs(hidden.detach(), own_head, ids, heats, config.fp32_logits)
                    known = replace(inputs, old_logprobs=own)
                return routed_loss(hidden, own_head, known, config, kl, fade, states, head, heat)

        return self.student(student_row(rows.sequences), use), inputs

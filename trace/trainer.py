"""The trainer: offline steps over routed tables, then online steps on fresh rollouts.

Stage train runs it. One optimiser step packs the routed sequences of some groups into micro-batches
(batches.py, sequences.py, packing.py). For each micro-batch the student's states at response tokens
and, while λ > 0 (schedule.py), the teacher's at routed tokens enter the loss (fused.py, losses.py).
Gradients add up with weights that are global to the step.

The teacher holds the student's weights of some steps ago, their moving average, or the base
policy's, or another model's. Once λ stays 0 the teacher is dropped and the annotator no longer
called: the rest is plain GRPO, as are the steps before `schedule.start_step`.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from ..schemas.configs import TrainConfig
from ..schemas.errors import InputError, Stopped
from .batches import MicroBatch, rank_batches
from .clock import Phase, PhaseClock
from .device_peak import device_peak
from .fused import routed_loss, token_logprobs
from .gate_limits import StepSignals
from .gates import Limits
from .losses import Head, LossInputs, LossOutput, token_weights
from .metrics import SUMS, TokenSums, step_metrics
from .model_flops import model_flops
from .optim import check_optimizer, learning_rate, make_optimizer
from .policy import Policy
from .ranks import Ranks
from .schedule import grpo_weight, kl_weight, teaches_from
from .sequences import (
    TrainingSequence,
    loss_inputs,
    signal_groups,
    student_row,
    training_sequences,
)
from .sharding import average_weights, copy_weights, reshard
from .start import start_models
from .teaching import contrast_logprobs, teacher_states
from .utilisation import GpuBusy, over_ranks, sampling_rates, throughput

logger = logging.getLogger(__name__)
Metrics = dict[str, float | int | str]


class OfflineSource(Protocol):
    """Routed tables made before training: `(step) -> routed table` of that step's groups."""

    def __call__(self, step: int) -> Any: ...


class Online(Protocol):
    """Makes a step's routed table from the current weights; see `online.OnlineSource`."""

    def collect(
        self, step: int, with_teacher: bool, phase: Phase
    ) -> tuple[Any, dict[str, float]]: ...


@dataclass
class TrainerState:
    """The counters that a checkpoint restores.

    step: steps done; kl_exposure: Σ λ²; skipped_in_a_row, skipped: steps without a finite gradient;
    limits: what `loss.gates` took from the last step that had a teacher and a finite gradient.
    """

    step: int = 0
    kl_exposure: float = 0.0
    skipped_in_a_row: int = 0
    skipped: int = 0
    limits: Limits | None = None


class Trainer:
    """Holds the student, its optimiser and its teacher."""

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        ranks: Ranks | None = None,
        other_teacher: Any = None,
    ) -> None:
        """other_teacher: the model of `teacher.model`, from `load_teacher`; None without."""
        self.policy = policy
        self.config = config
        self.ranks = ranks or Ranks()
        self.state = TrainerState()
        check_optimizer(config.optim, policy.device, self.ranks.shards(policy.compute_dtype))
        models = start_models(policy, config, self.ranks, other_teacher)
        self.student, self.trained = models.student, models.trained
        self.teacher, self.reference = models.teacher, models.reference
        self._flops = model_flops(policy.model)
        self.optimizer = make_optimizer(self.student.parameters(), config.optim, policy.device)

    @property
    def total_steps(self) -> int:
        return self.config.offline.steps + self.config.online.steps

    def run(
        self,
        offline: OfflineSource | None,
        online: Online | None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[Metrics]:
        """Train from the current state to the end; yields each step's metrics.

        Raises:
            Stopped: `stopping` became true; checked before a step and between its phases.
        """
        busy = GpuBusy(self.policy.device)
        try:
            while self.state.step < self.total_steps:
                if stopping():
                    raise Stopped
                yield self._run_step(offline, online, stopping, busy)
        finally:
            busy.close()

    def _run_step(
        self,
        offline: OfflineSource | None,
        online: Online | None,
        stopping: Callable[[], bool],
        busy: GpuBusy,
    ) -> Metrics:
        """One step from its table to its metrics, the same on every rank."""
        step, device = self.state.step, self.policy.device
        # Ranks must stop at the same point, so several ranks stop between steps only.
        clock = PhaseClock(stopping if self.ranks.count == 1 else lambda: False, device)
        kl = kl_weight(step, self.config.schedule)
        counts: dict[str, float] = {}
        if step < self.config.offline.steps:
            assert offline is not None, "offline steps need routed tables"
            clock("read")
            table, phase = offline(step), "offline"
        else:
            assert online is not None, "online steps need a source of rollouts"
            (table, counts), phase = online.collect(step, kl > 0, clock), "online"
        clock("prepare")
        sequences = training_sequences(
            table, self.policy.tokenizer, self.config.prompt, self._asks_teacher(kl)
        )
        metrics = self.train_step(sequences, clock)
        timed = over_ranks(self.ranks.gather(clock.metrics() | busy.metrics()))
        flops = self._flops and self._flops.step(self._trained_sequences(sequences))
        gpus = self.ranks.count if device.type == "cuda" else 0
        rates = throughput(metrics["tokens"], flops, timed, gpus, device_peak(device))
        ahead = {name: s for name, s in counts.items() if name.startswith("seconds_")}
        rates |= sampling_rates(timed, ahead)
        return {"step": step, "phase": phase} | metrics | rates | counts | timed

    def _asks_teacher(self, kl: float) -> bool:
        """Whether a step at this λ runs the teacher: scores take its place."""
        return kl > 0 and self.config.teacher.scores is None

    def _trained_sequences(
        self, sequences: Sequence[TrainingSequence]
    ) -> Sequence[TrainingSequence]:
        if not self.config.drop_groups_without_signal:
            return sequences
        kept = signal_groups(sequences)
        return [sequence for sequence in sequences if sequence.group_id in kept]

    def train_step(
        self, sequences: Sequence[TrainingSequence], phase: Phase = lambda _: None
    ) -> dict[str, float]:
        """One optimiser step on routed sequences of complete groups, the same on every rank.

        Raises:
            InputError: the gradient was not finite too often in a row.
        """
        config = self.config
        kl = kl_weight(self.state.step, config.schedule)
        phase("sync")
        self._sync_teacher()
        phase("train")
        trained = self._trained_sequences(sequences)
        signals = StepSignals(config.loss.gates)
        sums, largest_drift = self.accumulate_gradients(trained, kl, signals)
        norm, lr = self._step_optimizer()
        skipped = not math.isfinite(norm)
        if not skipped and self.teacher is not None and config.teacher.sync == "ema":
            average_weights(self.trained, self.teacher, config.teacher.ema_rate)
        if not skipped:
            self.state.limits = signals.limits(self.ranks) or self.state.limits
        self.state.step += 1
        self.state.kl_exposure += kl**2
        self.state.skipped += skipped
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if skipped else 0
        if self.state.skipped_in_a_row > config.optim.max_skipped_steps:
            raise InputError(
                f"step {self.state.step - 1}: the gradient was not finite "
                f"{self.state.skipped_in_a_row} times in a row; lower optim.lr, inspect the "
                "metrics "
                "of the steps before, and resume from the last checkpoint"
            )
        self.restore_identity()
        metrics = step_metrics(sequences, sums, largest_drift, self.reference is not None) | {
            "loss": sums["loss"],
            "grad_norm": norm,
            "lr": lr,
            "kl_weight": kl,
            "kl_exposure": self.state.kl_exposure,
            "steps_skipped": float(self.state.skipped),
        }
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def accumulate_gradients(
        self,
        sequences: Sequence[TrainingSequence],
        kl: float,
        signals: StepSignals | None = None,
    ) -> tuple[dict[str, float], float]:
        """Add the step's gradients to the student's parameters.

        signals: gets those of this rank's routed tokens. Returns the sums of metrics.SUMS over all
        tokens, and the largest drift, over all ranks.
        """
        device, (index, count) = self.policy.device, (self.ranks.index, self.ranks.count)
        weights = token_weights([s.policy_tokens for s in sequences], self.config.loss)
        # FSDP averages gradients over ranks; the step needs their sum.
        weights = (weights * count).tolist()
        weight_of = {s.rollout_id: w for s, w in zip(sequences, weights, strict=True)}
        budget = self.config.micro_batch_tokens
        batches = rank_batches(sequences, index, count, budget, self._asks_teacher(kl))
        routed = any(batch.teacher_passes for batch in batches)
        routed |= any(sequence.scores is not None for sequence in sequences)
        sums = TokenSums(device, gated=bool(self.config.loss.gates))
        # Nothing in the loop waits for a GPU, so the host makes the tensors of the next micro-batch
        # while the GPU computes.
        for batch in batches:
            scale = [0.0 if batch.idle else weight_of[row.rollout_id] for row in batch.rows]
            inputs = loss_inputs(batch.rows, scale, device, self.config.loss)
            output = self._objective(batch, inputs, kl if routed else 0.0)
            output.loss.backward()
            if not batch.idle:
                sums.add(output, inputs, kl > 0)
                if signals is not None and kl > 0 and routed:
                    signals.add(output, inputs)
        for frozen in (self.teacher, self.reference):
            if frozen is not None:
                reshard(frozen)
        own, largest = sums.read()
        totals = dict(zip(SUMS, self.ranks.sum(own), strict=True))
        totals["loss"] /= count  # of the weights
        return totals, self.ranks.most([largest])[0]

    def _objective(self, batch: MicroBatch, inputs: LossInputs, kl: float) -> LossOutput:
        loss, heat = self.config.loss, self.config.teacher.temperature
        row, states, head = student_row(batch.rows), None, None
        if batch.teacher_passes:
            assert self.teacher is not None, "λ > 0 needs a teacher"
            states, head = teacher_states(self.teacher, batch)
            contrast = contrast_logprobs(self.teacher, batch, inputs, heat, loss.fp32_logits)
            inputs = replace(inputs, contrast_logprobs=contrast)
        if self.reference is not None:

            def score(states: torch.Tensor, head: Head) -> torch.Tensor:
                ids, heats = inputs.token_ids, inputs.temperature
                return token_logprobs(states, head, ids, heats, loss.fp32_logits)

            with torch.no_grad():
                inputs = replace(inputs, reference_logprobs=self.reference(row, score))
        fade = grpo_weight(kl, self.config.schedule)

        def objective(hidden: torch.Tensor, own_head: Head) -> LossOutput:
            limits = self.state.limits
            return routed_loss(hidden, own_head, inputs, loss, kl, fade, states, head, heat, limits)

        return self.student(row, objective)

    def _step_optimizer(self) -> tuple[float, float]:
        """Clip and apply the gradients, then clear them; gradients that are not finite are dropped.

        Returns the norm before clipping and the learning rate.
        """
        optim = self.config.optim
        total = torch.nn.utils.clip_grad_norm_(self.student.parameters(), optim.max_grad_norm)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        lr = learning_rate(self.state.step, self.total_steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            logger.warning("step %d: gradient is %s, skipped", self.state.step, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, lr

    def restore_identity(self) -> None:
        """Set the policy's step count, which its next rollouts record."""
        self.policy.info = replace(self.policy.info, step=self.state.step)

    def _sync_teacher(self) -> None:
        """Drop the teacher once λ stays 0; else copy the student's weights every `sync_steps`."""
        if not teaches_from(self.state.step, self.config.schedule):
            self.teacher = None
        sync = self.config.teacher
        if (
            self.teacher is not None
            and sync.sync == "periodic"
            and not self.state.step % sync.sync_steps
        ):
            copy_weights(self.trained, self.teacher)

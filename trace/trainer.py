"""The trainer: offline steps over routed tables, then online steps on fresh rollouts.

One optimiser step: the routed sequences of some groups are cut into micro-batches; for each, the
student's logits at response tokens and, while λ > 0, the teacher's logits at routed tokens go into
the objective (losses.py); gradients add up with weights that are global to the step.

The teacher is a frozen copy of the student's weights, refreshed every `teacher_sync_steps`. Once λ
is 0 it is let go, and the annotator is not called any more: what is left is GRPO.
"""

import copy
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from ..schemas.configs import TrainConfig
from ..schemas.labels import Route
from .batch import (
    TrainingSequence,
    check_head,
    micro_batches,
    response_logits,
    routed_positions,
    training_sequences,
)
from .losses import LossInputs, routed_loss, sampled_logprobs
from .online import OnlineSource
from .policy import Policy
from .schedule import grpo_weight, kl_weight

logger = logging.getLogger(__name__)


class OfflineSource(Protocol):
    """Routed tables made ahead: `(step) -> routed table` of that step's groups."""

    def __call__(self, step: int) -> Any: ...


@dataclass
class TrainerState:
    """What a resumed run needs besides weights: steps done and Σ λ² so far."""

    step: int = 0
    kl_exposure: float = 0.0


class Trainer:
    """Holds the student, its optimiser and its teacher."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy = policy
        self.config = config
        self.state = TrainerState()
        self.teacher: Any = None
        self.reference: Any = _frozen(policy.model) if config.loss.reference_kl else None
        check_head(policy.model)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            policy.model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
        )

    @property
    def total_steps(self) -> int:
        return self.config.offline.steps + self.config.online.steps

    def run(
        self, offline: OfflineSource | None, online: OnlineSource | None
    ) -> Iterator[dict[str, float | int | str]]:
        """Train from the current state to the end; yields each step's metrics."""
        while self.state.step < self.total_steps:
            step = self.state.step
            clock = _PhaseClock()
            kl = kl_weight(step, self.config.schedule)
            if step < self.config.offline.steps:
                assert offline is not None, "offline steps need routed tables"
                clock("read")
                table, phase = offline(step), "offline"
            else:
                assert online is not None, "online steps need a source of rollouts"
                table, phase = online.collect(step, kl > 0, clock), "online"
            clock("prepare")
            sequences = training_sequences(
                table, self.policy.tokenizer, self.config.prompt, with_teacher=kl > 0
            )
            metrics = self.train_step(sequences, clock)
            seconds = clock.seconds()
            metrics["tokens_per_second"] = metrics["tokens"] / seconds["seconds"]
            yield {"step": step, "phase": phase} | metrics | seconds

    def train_step(
        self, sequences: Sequence[TrainingSequence], phase: Callable[[str], None] = lambda _: None
    ) -> dict[str, float]:
        """One optimiser step on routed sequences of whole groups."""
        step, config = self.state.step, self.config
        kl = kl_weight(step, config.schedule)
        phase("sync")
        self._sync_teacher(step, kl)
        phase("train")
        sums, loss = self.accumulate_gradients(sequences, kl)
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.model.parameters(), config.optim.max_grad_norm
        )
        lr = config.optim.lr * min(1.0, (step + 1) / (config.optim.warmup_steps or 1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.kl_exposure += kl**2
        self.restore_identity()
        return step_metrics(sequences, sums) | {
            "loss": loss,
            "grad_norm": norm.item(),
            "lr": lr,
            "kl_weight": kl,
            "kl_exposure": self.state.kl_exposure,
        }

    def accumulate_gradients(
        self, sequences: Sequence[TrainingSequence], kl: float
    ) -> tuple[Counter[str], float]:
        """Add the step's gradients to the student's parameters; statistics' sums and the loss."""
        sums: Counter[str] = Counter()
        total = 0.0
        for rows in micro_batches(sequences, self.config.micro_batch_tokens):
            inputs = self._loss_inputs(rows, len(sequences), kl)
            out = routed_loss(inputs, kl, grpo_weight(kl, self.config.schedule), self.config.loss)
            out.loss.backward()
            sums.update(out.sums)
            total += out.loss.item()
        return sums, total

    def _loss_inputs(
        self, rows: list[TrainingSequence], step_sequences: int, kl: float
    ) -> LossInputs:
        device = self.policy.device
        lengths = np.array([len(row.token_ids) for row in rows])

        def flat(parts: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(device)

        def per_token(values: list[float]) -> torch.Tensor:
            return torch.from_numpy(np.repeat(np.array(values, np.float32), lengths)).to(device)

        temperature = per_token([row.temperature or 1.0 for row in rows])[:, None]
        token_ids = flat([row.token_ids for row in rows])

        def logits(model: Any) -> torch.Tensor:
            with self.policy.autocast():
                raw = response_logits(
                    model,
                    [row.prompt_ids for row in rows],
                    [row.token_ids for row in rows],
                    [np.arange(length) for length in lengths],
                )
            return raw / temperature

        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = sampled_logprobs(logits(self.reference), token_ids)
        return LossInputs(
            logits=logits(self.policy.model),
            token_ids=token_ids,
            old_logprobs=flat([row.logprobs for row in rows]),
            advantage=per_token([row.advantage for row in rows]),
            route=flat([row.route for row in rows]),
            weight=per_token([1.0 / (step_sequences * len(row.token_ids)) for row in rows]),
            teacher_logits=self._teacher_logits(rows) if kl > 0 else None,
            reference_logprobs=reference,
        )

    @torch.no_grad()
    def _teacher_logits(self, rows: list[TrainingSequence]) -> torch.Tensor | None:
        """Teacher's logits at routed tokens, in the rows' order: (routed, vocab).

        It reads rows with routed tokens only, up to their last routed token, behind its own
        prompt: the problem and the type label.
        """
        routed = [row for row in rows if row.routed_end]
        if not routed:
            return None
        assert self.teacher is not None, "the teacher is synced before a step with λ > 0"
        keep = [routed_positions(row) for row in routed]
        prompts = [row.teacher_prompt_ids or [] for row in routed]
        with self.policy.autocast():
            logits = response_logits(
                self.teacher, prompts, [row.token_ids[: row.routed_end] for row in routed], keep
            )
        temperature = np.repeat([row.temperature or 1.0 for row in routed], list(map(len, keep)))
        return logits / torch.from_numpy(temperature).to(logits)[:, None]

    def set_teacher(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the frozen teacher these weights, making it first if needed."""
        if self.teacher is None:
            self.teacher = _frozen(self.policy.model)
        self.teacher.load_state_dict(weights)

    def restore_identity(self) -> None:
        """Rollouts made from now on carry the number of steps that the weights have seen."""
        self.policy.info = replace(self.policy.info, step=self.state.step)

    def _sync_teacher(self, step: int, kl: float) -> None:
        if kl == 0:
            self.teacher = None
        elif self.teacher is None or step % self.config.teacher_sync_steps == 0:
            self.set_teacher(self.policy.model.state_dict())


def _frozen(model: Any) -> Any:
    """A copy that does not train."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def step_metrics(sequences: Sequence[TrainingSequence], sums: Counter[str]) -> dict[str, float]:
    """A step's means from its sequences and the objective's sums. Units: nats, tokens, shares.

    A step without a sequence (no rollout could be scored) changes nothing and has no means.
    """
    if not sequences:
        return {"sequences": 0.0, "tokens": 0.0}
    rewards: dict[str, list[float]] = defaultdict(list)
    for sequence in sequences:
        rewards[sequence.group_id].append(sequence.reward)
    lengths = [len(sequence.token_ids) for sequence in sequences]
    tokens = max(sum(lengths), 1)
    routed = {route: sum(int((s.route == route).sum()) for s in sequences) for route in Route}
    all_rewards = [sequence.reward for sequence in sequences]
    metrics = {
        "sequences": float(len(sequences)),
        "reward": float(np.mean(all_rewards)),
        "pass_rate": float(np.mean([reward > 0 for reward in all_rewards])),
        "groups_without_signal": float(np.mean([len(set(r)) == 1 for r in rewards.values()])),
        "response_tokens": float(np.mean(lengths)),
        "truncated": float(np.mean([sequence.truncated for sequence in sequences])),
        "coverage_fkl": routed[Route.FKL] / tokens,
        "coverage_rkl": routed[Route.RKL] / tokens,
        "entropy": sums["entropy"] / tokens,
        "ratio_clipped": sums["ratio_clipped"] / tokens,
        "sampler_drift": sums["sampler_drift"] / tokens,
        "tokens": float(tokens),
    }
    for name in ("fkl", "rkl"):
        if sums[f"{name}_tokens"]:
            metrics[f"kl_{name}"] = sums[f"{name}_kl"] / sums[f"{name}_tokens"]
    if "reference_kl" in sums:
        metrics["kl_reference"] = sums["reference_kl"] / tokens
    if kl_tokens := sums["fkl_tokens"] + sums["rkl_tokens"]:
        metrics["kl_clipped"] = sums["kl_clipped"] / kl_tokens
    return metrics


class _PhaseClock:
    """Seconds per phase of a step: call it with a phase's name when that phase begins."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._phase, self._since = "other", time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self._spent[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def seconds(self) -> dict[str, float]:
        self("other")
        total = sum(self._spent.values())
        phases = {f"seconds_{name}": s for name, s in self._spent.items() if name != "other"}
        return phases | {"seconds": total}

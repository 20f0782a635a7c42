"""Runs step.py's implementations in processes of their own, and checks that they agree."""

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from shapes import random_model, shape_of
from step_turns import Measured, Mode, Turns
from turns import Ended, Workers

PRELOADED = [
    "trace_opd.trace.trainer",
    "trace_opd.pipelines.training.plan",
    "trace_opd.pipelines.annotators.rows",
    "transformers.models.auto.modeling_auto",
]
# Largest relative difference between gradient norms.
TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}


@dataclass(frozen=True)
class Batch:
    """lengths: its name. case: a pickled step_case.Case, which this process does not load."""

    lengths: str
    group_size: int
    description: str
    case: bytes


@dataclass
class Samples:
    """Measurements of one implementation by batch and mode; reasons by batch where there are
    none.
    """

    measured: dict[tuple[int, Mode], list[Measured]] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)


def prepare(options: Any, sizes: list[tuple[int, int]], folder: str) -> list[Batch]:
    """The batches of step.py's options. folder: of random models."""
    with Workers(options.device, PRELOADED) as workers:
        return workers.call(_batches, options, sizes, folder)


def _batches(options: Any, sizes: list[tuple[int, int]], folder: str) -> list[Batch]:
    from step_case import description, random_case, sampled_case, unsampled_case

    from trace_opd.schemas.configs import RoutingConfig
    from trace_opd.schemas.labels import Route

    routing = RoutingConfig(alpha=0.25, key=Route.FKL, error=options.error)
    if sizes:
        model = random_model(shape_of(options.shape), folder)
        cases = [
            random_case(model, options.device, size, _group(size[0], options.group_size), routing)
            for size in sizes
        ]
    else:
        how = options.groups, options.group_size, options.max_new_tokens
        case = unsampled_case(options.shape, options.device, *how, routing, folder)
        cases = [sampled_case(case)]
    return [Batch(c.lengths, c.group_size, description(c), pickle.dumps(c)) for c in cases]


def _group(responses: int, most: int) -> int:
    return next(size for size in range(min(most, responses), 0, -1) if responses % size == 0)


def measure(
    names: list[str], batches: list[Batch], device: str, micro_batch_tokens: int, repetitions: int
) -> Iterator[tuple[str, Samples]]:
    """The samples of each implementation, as soon as they are known."""
    norms: dict[str, tuple[str, float]] = {}
    for group in [[name] for name in names] if device == "cuda" else [names]:
        found = {name: Samples() for name in group}
        jobs = [_Job(n, own, found[n], device) for n in group for own in _shares(n, batches)]
        for together in [[job] for job in jobs] if device == "cuda" else [jobs]:
            with Workers(device, PRELOADED) as workers:
                for job in together:
                    job.start(workers, batches, micro_batch_tokens)
                    job.warm_up(workers, norms, batches)
                for _ in range(repetitions):
                    for job in together:
                        job.repeat(workers, batches)
        yield from found.items()


def _shares(name: str, batches: list[Batch]) -> list[list[int]]:
    """Indices of the batches that one process takes; TRL's trainer takes one size."""
    every = list(range(len(batches)))
    return [[index] for index in every] if name.startswith("trl") else [every]


@dataclass
class _Job:
    """A process of an implementation, and the batches that it takes turns on."""

    name: str
    indices: list[int]
    samples: Samples
    device: str

    @property
    def _key(self) -> str:
        return f"{self.name} {self.indices}"

    @property
    def _teaches(self) -> bool:
        return self.name.startswith("ours") and not self.name.startswith("ours_grpo")

    def start(self, workers: Workers, batches: list[Batch], micro_batch_tokens: int) -> None:
        single = [index for index in self.indices if batches[index].group_size == 1]
        if self.name.startswith(("trl", "ours_rl")) and single:
            self._give_up(single, "a group needs two responses")
            if not self._alive():
                return
        own = [batches[index].case for index in self.indices]
        workers.start(self._key, step_process, self.name, own, micro_batch_tokens)

    def warm_up(
        self, workers: Workers, norms: dict[str, tuple[str, float]], batches: list[Batch]
    ) -> None:
        """norms: of the first implementation of each objective and batch, which others must
        have.
        """
        for index in self._alive():
            measured = self._turn(workers, index, "warm-up")
            if measured is None:
                return
            norm, objective = measured.grad_norm, self.name.partition(":")[0].rpartition("_")[2]
            kind = objective if self._teaches else "grpo"
            key = f"{kind}, {batches[index].lengths}"
            other, expected = norms.setdefault(key, (self.name, norm))
            if not math.isclose(norm, expected, rel_tol=TOLERANCE[self.device]):
                reason = f"its gradient norm {norm:.6g} is not {other}'s, {expected:.6g}"
                self._give_up([index], reason)
            elif self.device == "cuda":
                self._turn(workers, index, "training")

    def repeat(self, workers: Workers, batches: list[Batch]) -> None:
        for index in self._alive():
            modes: list[Mode] = ["training"]
            if batches[index].lengths == "sampled":
                modes += ["generation"] * (not self.name.startswith("plain"))
            if self._teaches:
                modes += ["teacher"]
            for mode in modes:
                if (measured := self._turn(workers, index, mode)) is None:
                    return
                self.samples.measured.setdefault((index, mode), []).append(measured)

    def _turn(self, workers: Workers, index: int, mode: Mode) -> Measured | None:
        try:
            return workers.ask(self._key, (self.indices.index(index), mode))
        except Ended as reason:
            # The batches behind it find no process either.
            self._give_up(self.indices[self.indices.index(index) :], str(reason))
            return None

    def _give_up(self, indices: list[int], reason: str) -> None:
        for index in indices:
            self.samples.notes[index] = reason

    def _alive(self) -> list[int]:
        return [index for index in self.indices if index not in self.samples.notes]


def step_process(name: str, cases: list[bytes], micro_batch_tokens: int, pipe: Connection) -> None:
    from transformers.utils.logging import disable_progress_bar

    own = [pickle.loads(case) for case in cases]  # noqa: S301 - made by `prepare`
    disable_progress_bar()
    base, _, text = name.partition(":")
    overrides = text.split(",") if text else []
    turns = Turns(pipe, own[0].device)
    if base.startswith("ours"):
        from step_ours import ours

        ours(own, turns, micro_batch_tokens, base, overrides)
        return
    recompute = overrides == ["gradient_checkpointing=true"]
    if overrides and not recompute:
        raise ValueError(f"{name}: a peer takes no override but gradient_checkpointing=true")
    if base == "plain":
        from step_plain import plain

        plain(own, turns, micro_batch_tokens, recompute)
    else:
        from step_trl import trl_grpo

        trl_grpo(own[0], turns, micro_batch_tokens, recompute)

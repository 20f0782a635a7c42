"""Engine local: a teacher on this machine, over packed rows as in training (trace/packing.py).

It gives the whole distribution, so entropies are exact, and a student's divergence from it can be
added.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...data.store import Dataset
from ...schemas.configs import LocalTeacher, PolicyConfig, ScoreConfig
from ...schemas.errors import InputError
from ...trace.architecture import check_architecture
from ...trace.batches import taught_rows
from ...trace.identity import model_revision
from ...trace.packing import PackedModel, pack
from ...trace.policy import Policy, load_policy, load_tokenizer, vocab_fingerprint
from ...trace.sequences import TrainingSequence, teacher_row
from ..models import resolve_policy
from ..progress import count_rows
from ..samplers.context_length import context_length
from .distribution import scored
from .engine import Engine, Scored, Vocabulary


class LocalEngine:
    """See `Engine`."""

    def __init__(self, config: ScoreConfig) -> None:
        assert isinstance(config.teacher, LocalTeacher)
        self._config = config
        self._policies = {"teacher": config.teacher.policy}
        if config.student is not None:
            self._policies["student"] = config.student

    def identity(self, vocabulary: Vocabulary, routed: Dataset) -> dict[str, Any]:
        return {
            role: _identity(role, policy, vocabulary) for role, policy in self._policies.items()
        }

    def open(self, vocabulary: Vocabulary) -> "LocalScorer":
        return LocalScorer(self._config, self._policies, vocabulary)


def _identity(role: str, policy: PolicyConfig, vocabulary: Vocabulary) -> str:
    """Raises InputError for a model of another vocabulary."""
    path = resolve_policy(policy.path)
    tokenizer = load_tokenizer(path, policy.trust_remote_code)
    if vocab_fingerprint(tokenizer) != vocabulary.fingerprint:
        raise InputError(
            f"{role} {policy.path}: has another vocabulary than the policy, so its "
            "log-probabilities are of other tokens; name a model of the same vocabulary"
        )
    return model_revision(path, policy.trust_remote_code)


class LocalScorer:
    """A teacher, and a student if the config names one. See `Scorer`."""

    def __init__(
        self, config: ScoreConfig, policies: dict[str, PolicyConfig], vocabulary: Vocabulary
    ) -> None:
        self._config = config
        loaded: dict[str, Policy] = {}
        for role, policy in policies.items():
            loaded[role] = load_policy(
                resolve_policy(policy.path),
                policy.device,
                policy.precision,
                trust_remote_code=policy.trust_remote_code,
            )
            check_architecture(loaded[role].model.config, policy.trust_remote_code)
        self._models = {role: PackedModel(one.model) for role, one in loaded.items()}
        self._devices = {role: one.device for role, one in loaded.items()}
        self._context = context_length(loaded["teacher"].model.config)
        sizes = [one.model.get_input_embeddings().num_embeddings for one in loaded.values()]
        self._size = min(vocabulary.size, *sizes)
        info = loaded["teacher"].info
        self.name, self.revision = info.name, info.revision
        with_student = ("student_entropy", "divergence") if "student" in self._models else ()
        self.extras: tuple[str, ...] = ("teacher_entropy", *with_student)

    def score(self, sequences: Sequence[TrainingSequence]) -> list[Scored]:
        """See `Scorer`.

        Raises:
            InputError: a sequence that does not fit into the teacher's context, or a token that
                the teacher has no id for.
        """
        for sequence in sequences:
            self._check(sequence)
        # Consecutive equal prompts are stored once.
        ordered = sorted(
            sequences, key=lambda s: (s.group_id, s.teacher_prompt_ids or [], s.rollout_id)
        )
        found: dict[str, Scored] = {}
        for rows in taught_rows(ordered, self._config.micro_batch_tokens):
            scores, first = self._score(rows), 0
            for row in rows:
                count = len(row.routed_positions)
                found[row.rollout_id] = scores[first : first + count]
                first += count
            count_rows(len(rows))
        return [found[sequence.rollout_id] for sequence in sequences]

    @torch.no_grad()
    def _score(self, rows: list[TrainingSequence]) -> Scored:
        """The teacher at all routed tokens of the rows, one row after another."""
        student = None
        if "student" in self._models:
            row = pack(
                [one.prompt_ids for one in rows],
                [one.token_ids[: one.routed_end] for one in rows],
                [one.routed_positions for one in rows],
            )
            states, head = self._models["student"](row, lambda states, head: (states, head))
            device = self._devices["teacher"]
            head = head if states.device == device else _moved(head, device)
            student = states.to(device), head, self._temperatures(rows, sampled=True)

        def use(states: torch.Tensor, head: Any) -> Scored:
            ids = np.concatenate([one.token_ids[one.routed_positions] for one in rows])
            ids = torch.from_numpy(ids.astype(np.int64)).to(states.device)
            k = min(self._config.k, self._size)
            own = self._temperatures(rows, sampled=False)
            return scored(states, head, ids, own, k, self._size, student)

        return self._models["teacher"](teacher_row(rows), use)

    def _temperatures(self, rows: list[TrainingSequence], sampled: bool) -> torch.Tensor:
        """Of each routed token, (tokens,) float32. sampled: the student's, else the teacher's."""
        given = None if sampled else self._config.temperature
        values = [given or one.temperature or 1.0 for one in rows]
        counts = [len(one.routed_positions) for one in rows]
        spread = np.repeat(np.asarray(values, np.float32), counts)
        return torch.from_numpy(spread).to(self._devices["teacher"])

    def _check(self, sequence: TrainingSequence) -> None:
        tokens = len(sequence.teacher_prompt_ids or []) + sequence.routed_end
        if self._context is not None and tokens > self._context:
            raise InputError(
                f"rollout {sequence.rollout_id}: its {tokens} tokens up to the last routed one do "
                f"not fit into the context of {self._context} tokens of teacher {self.name}; "
                "score with another teacher, or route without that response"
            )
        most = max(int(sequence.token_ids.max()), *(sequence.teacher_prompt_ids or [0]))
        if most >= self._size:
            raise InputError(
                f"rollout {sequence.rollout_id}: token id {most} is none of the "
                f"{self._size} that policy, teacher and student share; score with a teacher that "
                "has it"
            )

    def close(self) -> None:
        self._models.clear()


def _moved(head: Any, device: torch.device) -> Any:
    """A head on another device: student and teacher may run on two."""
    bias = None if head.bias is None else head.bias.to(device)
    return type(head)(head.weight.to(device), bias, head.softcap)


ENGINE: type[Engine] = LocalEngine

"""What stage score needs of an engine: its identity, and a scorer of sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...data.store import Dataset
from ...trace.sequences import TrainingSequence


@dataclass(frozen=True)
class Vocabulary:
    """Of the policy that made the token ids: its tokenizer, fingerprint and number of ids."""

    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    size: int


@dataclass(frozen=True)
class Scored:
    """A teacher at some tokens, one row each.

    token_ids: (tokens, k) int32, likeliest first; top_logprobs: (tokens, k) float32, nats. The
    rest is (tokens,) float32: tail, the log mass of all other tokens; logprobs, of the response's
    tokens; entropies and divergence, None if unknown. trace.scores.NOTHING stands for −∞.
    """

    token_ids: np.ndarray
    top_logprobs: np.ndarray
    tail: np.ndarray
    logprobs: np.ndarray
    teacher_entropy: np.ndarray | None = None
    student_entropy: np.ndarray | None = None
    divergence: np.ndarray | None = None

    def __getitem__(self, rows: slice) -> "Scored":
        return Scored(*(None if x is None else x[rows] for x in self.arrays()))  # pyright: ignore[reportArgumentType]

    def arrays(self) -> list[np.ndarray | None]:
        """All fields, in their order."""
        return [getattr(self, name) for name in self.__dataclass_fields__]


class Scorer(Protocol):
    """An open teacher. name, revision: as the table records them. extras: which optional columns it
    fills.
    """

    name: str
    revision: str
    extras: tuple[str, ...]

    def score(self, sequences: Sequence[TrainingSequence]) -> list[Scored]:
        """What the teacher gives the routed tokens of each sequence, all of which have some."""
        ...

    def close(self) -> None: ...


class Engine(Protocol):
    """identity: what the dataset's id records of teacher and student, by the field that it stands
    for; raises InputError for a model that is not there, has another vocabulary, or cannot score
    that dataset. open: loads the models, or makes the clients.
    """

    def __init__(self, config: Any) -> None: ...

    def identity(self, vocabulary: Vocabulary, routed: Dataset) -> dict[str, Any]: ...

    def open(self, vocabulary: Vocabulary) -> Scorer: ...

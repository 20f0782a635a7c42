"""What a rule sees: one response, or many at once.

responses.py makes both from tables; rules.py reads them, and the user's own rules read `Response`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..schemas.labels import SpanKind


def token_cap(alpha: float, tokens: Any) -> Any:
    """⌊α · tokens⌋, of a number or of an array: the coverage cap (METHOD.md, step 4).

    The 1e-9 keeps floating-point products such as 0.29 · 100 = 28.999… from losing a token.
    """
    return np.floor(alpha * tokens + 1e-9).astype(np.int64)


@dataclass(frozen=True)
class Response:
    """What a rule sees of one response: the tokens that the policy wrote.

    token_ids: (tokens,) int64; logprobs: (tokens,) float32, nats, under the sampling policy;
    token_segment: (tokens,) segment of each token, −1 for none; spans: segment indices of each
    span, in the annotator's order; kind: KEY if the response is correct, else ERROR;
    alpha: `routing.alpha`; entropy: (tokens,) float32, nats, the student's before each token;
    divergence: (tokens,) float32, nats, KL(student‖teacher) there. Both are None without scores of
    all of the response's tokens (`convert.scores`).
    """

    rollout_id: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    token_segment: np.ndarray
    spans: Sequence[Sequence[int]]
    kind: SpanKind
    alpha: float
    entropy: np.ndarray | None = None
    divergence: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def room(self) -> int:
        """⌊α · tokens⌋: the most tokens that the coverage cap allows."""
        return int(token_cap(self.alpha, self.tokens))

    @property
    def marked(self) -> np.ndarray:
        """(tokens,) bool: inside the annotator's spans, before the cap."""
        return np.isin(self.token_segment, [segment for span in self.spans for segment in span])

    def generator(self) -> np.random.Generator:
        """A generator seeded by the rollout id, so that a repeated run draws the same tokens."""
        return np.random.default_rng(list(self.rollout_id.encode()))


@dataclass(frozen=True)
class NamedSegments:
    """The segments that spans name, row by row, within a row in the annotator's order.

    segment: (named,) index; rank: (named,) of the span that names it; row: (named,).
    """

    segment: np.ndarray
    rank: np.ndarray
    row: np.ndarray


@dataclass(frozen=True)
class Block:
    """What a rule sees of many responses, flat.

    offsets: (rows + 1,), where each response begins among the tokens; token_segment: (tokens,)
    index into the segments of all rows, −1 for none; segment_tokens: (segments,) tokens of each;
    named: indices into them; room: (rows,) `token_cap` of each response; logprobs, entropy,
    divergence: (tokens,) as in `Response`, NaN for a response without scores.
    """

    offsets: np.ndarray
    token_segment: np.ndarray
    segment_tokens: np.ndarray
    named: NamedSegments
    room: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray | None = None
    divergence: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each response."""
        return np.diff(self.offsets)

    @property
    def places(self) -> np.ndarray:
        """(tokens,) the place of each token in its response."""
        return np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], self.lengths)


def block_of(response: Response) -> Block:
    """One response as a block."""
    named = [(segment, rank) for rank, span in enumerate(response.spans) for segment in span]
    segment, rank = np.array(named, dtype=np.int64).reshape(-1, 2).T
    count = max(response.token_segment.max(initial=-1), segment.max(initial=-1)) + 1
    return Block(
        offsets=np.array([0, response.tokens]),
        token_segment=response.token_segment,
        segment_tokens=np.bincount(response.token_segment + 1, minlength=int(count) + 1)[1:],
        named=NamedSegments(segment, rank, np.zeros_like(rank)),
        room=np.array([response.room]),
        logprobs=response.logprobs,
        entropy=response.entropy,
        divergence=response.divergence,
    )

"""Responses that end in a loop: the figure `looping` of a step's metrics.

metrics.py counts them, and collapse.py watches their share. The bounds are those of the clip study
(arXiv 2609.38995), which measures by them how a policy fails: a block of 2 to 50 tokens, repeated
at least 3 times and over at least 30 tokens, that reaches the response's last token.

They suit short responses too. A block is cut from the last 150 tokens at most, so the length of a
response does not matter. A response below 30 tokens has no loop: two equal lines of a sum or of a
list are no sign of one. A response that leaves its loop, or ends it with an end-of-sequence token,
has none either.
"""

from collections.abc import Sequence

import numpy as np

MIN_PERIOD, MAX_PERIOD = 2, 50  # tokens; one token repeated has period 2 as well
MIN_PERIODS = 3
MIN_TOKENS = 30
_TAIL = MAX_PERIOD * MIN_PERIODS


def ends_in_loop(responses: Sequence[np.ndarray]) -> np.ndarray:
    """Whether each response ends in a loop, (responses,) bool.

    responses: token ids, one integer array (tokens,) per response.
    """
    lengths = np.array([len(ids) for ids in responses], np.int64)  # (responses,)
    tails = np.full((len(responses), _TAIL), -1, np.int64)  # (responses, tail), aligned to the end
    for tail, ids in zip(tails, responses, strict=True):
        if len(ids):
            tail[-len(ids) :] = ids[-_TAIL:]
    looping = np.zeros(len(responses), bool)
    for period in range(MIN_PERIOD, MAX_PERIOD + 1):
        span = max(MIN_PERIODS * period, MIN_TOKENS)
        same = tails[:, -span + period :] == tails[:, -span:-period]  # (responses, span - period)
        looping |= same.all(axis=1) & (lengths >= span)
    return looping

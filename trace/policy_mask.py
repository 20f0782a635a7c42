"""Response tokens that the policy did not write: rules, the cap and coverage leave them out.

routed.py calls these functions where the rollouts have a column `policy_mask`. Responses are routed
as if they held the policy's tokens alone, and the routes are spread over all tokens after.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.configs import RoutingConfig
from ..schemas.contract import list_of
from ..schemas.labels import Route
from .responses import Responses, one_chunk, ragged, route_responses, to_numpy
from .route import Routing
from .token_scores import TokenScores, token_scores

POLICY_MASK = "policy_mask"


def flat_mask(rollouts: pa.Table) -> np.ndarray | None:
    """(tokens,) bool of all rows; None where the policy wrote every token."""
    if POLICY_MASK not in rollouts.column_names:
        return None
    mask = to_numpy(ragged(rollouts[POLICY_MASK]).values)
    return None if mask.all() else mask


def policy_lengths(rollouts: pa.Table) -> np.ndarray:
    """(rows,) tokens of each response that the policy wrote."""
    mask = flat_mask(rollouts)
    if mask is None:
        return to_numpy(pc.list_value_length(rollouts["token_ids"]))
    return np.diff(_among(mask, ragged(rollouts["token_ids"]).offsets))


def route_written(
    responses: Responses, mask: np.ndarray | None, taught: np.ndarray, config: RoutingConfig
) -> Routing:
    """`route_responses` of the tokens that the policy wrote; the others have route 0 and no span.

    mask: (tokens,); None: it wrote all. Coverage is a share of the policy's tokens.
    """
    if mask is None:
        return route_responses(responses, taught, config)
    own = route_responses(_only_policy(responses, mask), taught, config)
    route = np.full(len(mask), int(Route.GRPO), dtype=own.route.dtype)
    span_id = np.full(len(mask), -1, dtype=own.span_id.dtype)
    route[mask], span_id[mask] = own.route, own.span_id
    return replace(own, route=route, span_id=span_id)


def policy_scores(
    scores: pa.Table, rollouts: pa.Table, offsets: np.ndarray, mask: np.ndarray | None
) -> TokenScores:
    """`token_scores` of the tokens that the policy wrote."""
    if mask is None:
        return token_scores(scores, rollouts, offsets)
    own = _renumbered(scores, rollouts, offsets, mask)
    return token_scores(own, rollouts, _among(mask, offsets))


def _among(mask: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Places among all tokens as places among the policy's alone."""
    return np.concatenate(([0], np.cumsum(mask)))[places]


def _only_policy(responses: Responses, mask: np.ndarray) -> Responses:
    """The responses without the tokens that the policy did not write; mask: (tokens,)."""
    offsets = _among(mask, responses.token_ids.offsets)
    segment = responses.token_segment[mask]
    counts = np.bincount(segment[segment >= 0], minlength=len(responses.segment_tokens))
    rollouts = responses.rollouts
    for name in ("token_ids", "logprobs"):
        flat = ragged(rollouts[name]).values.filter(pa.array(mask))
        lists = _lists(offsets, flat)
        rollouts = rollouts.set_column(rollouts.column_names.index(name), name, lists)
    return replace(
        responses,
        rollouts=rollouts,
        token_ids=ragged(rollouts["token_ids"]),
        segment_tokens=counts,
        token_segment=segment,
    )


def _renumbered(
    scores: pa.Table, rollouts: pa.Table, offsets: np.ndarray, mask: np.ndarray
) -> pa.Table:
    """Scores with positions among the policy's tokens; −1 for others, and of other rollouts."""
    lists = ragged(scores["positions"])
    own = pc.index_in(scores["rollout_id"], value_set=one_chunk(rollouts["rollout_id"]))
    known: Any = pc.fill_null(own, pa.scalar(-1, pa.int32()))
    row = np.repeat(known.to_numpy(), lists.lengths)
    place = lists.values.to_numpy()
    there = (row >= 0) & (place < np.diff(offsets)[row])
    at = np.where(there, offsets[row] + place, 0)
    among = _among(mask, at) - _among(mask, offsets)[row]
    new = np.where(there & mask[at], among, -1).astype(np.int32)
    positions = _lists(lists.offsets, pa.array(new))
    return scores.set_column(scores.column_names.index("positions"), "positions", positions)


def _lists(offsets: np.ndarray, flat: Any) -> pa.ListArray:
    kind: Any = list_of(flat.type)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=kind)

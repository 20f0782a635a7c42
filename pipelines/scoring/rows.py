"""The scores table of a part: a row per routed row, in the routed table's order."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ...schemas.errors import InputError
from ...schemas.tables import SCORES
from ...trace.routed import lists_of
from ...trace.sequences import TrainingSequence
from .engine import Scored, Scorer

_MOST_ENTRIES = 2**31 - 1  # Arrow counts a list column's entries in 32 bits


def scores_table(
    sequences: Sequence[TrainingSequence],
    scored: Sequence[Scored],
    temperature: float | None,
    scorer: Scorer,
) -> pa.Table:
    """The table of some sequences; those without routed tokens have empty lists.

    scored: of the sequences with routed tokens, in order. temperature: the teacher's; None: each
    row's own. scorer: which made them.

    Raises:
        InputError: more entries than a part can hold.
    """
    positions = [sequence.routed_positions for sequence in sequences]
    offsets = np.concatenate(([0], np.cumsum([len(some) for some in positions], dtype=np.int64)))
    k = scored[0].token_ids.shape[1] if scored else 1
    if offsets[-1] * k > _MOST_ENTRIES:
        raise InputError(
            f"k={k} of {offsets[-1]} routed tokens are more entries than a part can hold; lower k, "
            "or make the problems with fewer rows_per_part"
        )

    def joined(name: str, kind: type, times: int = 1) -> pa.Array:
        values = [np.empty(0, kind), *(getattr(one, name).reshape(-1) for one in scored)]
        return lists_of(np.concatenate(values, dtype=kind), offsets * times)

    rows = len(sequences)
    heats = [temperature or sequence.temperature or 1.0 for sequence in sequences]
    columns = {
        "rollout_id": pa.array([sequence.rollout_id for sequence in sequences], pa.string()),
        "positions": lists_of(np.concatenate([np.empty(0), *positions]).astype(np.int32), offsets),
        "top_token_ids": joined("token_ids", np.int32, k),
        "top_logprobs": joined("top_logprobs", np.float32, k),
        "tail_logprobs": joined("tail", np.float32),
        "logprobs": joined("logprobs", np.float32),
        "temperature": pa.array(heats, pa.float32()),
        "teacher_name": pa.array([scorer.name] * rows, pa.string()),
        "teacher_revision": pa.array([scorer.revision] * rows, pa.string()),
    }
    columns |= {extra: joined(extra, np.float32) for extra in scorer.extras}
    schema = SCORES.schema_of(columns)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)

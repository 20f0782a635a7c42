"""Tokens of many responses at once get the same segments as each response alone."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_opd.schemas.tables import ANNOTATIONS
from trace_opd.trace.align import ByteTable
from trace_opd.trace.responses import aligned

# Pieces: characters of one to four bytes, several characters, and parts of characters.
CHARACTERS = st.text(st.sampled_from("ab .é漢😀"), max_size=3).map(str.encode)
BYTES = st.sampled_from(
    [*(bytes([byte]) for byte in "é漢😀".encode()), b"\xff", b"\xc3a", b"a\xf0"]
)
PIECES = st.lists(st.one_of(CHARACTERS, CHARACTERS, BYTES), min_size=1, max_size=10).map(
    lambda pieces: ByteTable((*pieces, *(bytes([byte]) for byte in "é漢😀".encode())))
)


def cuts_of(text: str, data: st.DataObject) -> list[tuple[int, int]]:
    """Segments that tile the text, some of them empty; sometimes none at all."""
    if not text or data.draw(st.integers(0, 5)) == 0:
        return []
    inner = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    return list(pairwise(sorted([0, *inner, len(text)])))


@given(table=PIECES, data=st.data())
@settings(deadline=None, max_examples=200)
def test_tokens_fall_into_the_segments_that_the_byte_table_says(table, data):
    split = list(range(len(table.pieces) - 9, len(table.pieces)))  # é, 漢 and 😀, byte by byte
    ids = st.one_of(
        st.integers(0, len(table.pieces)).map(lambda one: [one]),
        st.sampled_from([split[:2], split[2:5], split[5:]]),
    )
    drawn = data.draw(st.lists(st.lists(ids, max_size=8), min_size=1, max_size=4))
    rows = [[token for some in row for token in some] for row in drawn]
    texts = [table.text(row) for row in rows]
    segments = [cuts_of(text, data) for text in texts]
    rollouts = pa.table(
        {
            "rollout_id": [str(row) for row in range(len(rows))],
            "token_ids": pa.array(rows, pa.list_(pa.int32())),
            "response": texts,
        }
    )
    tiles = [[{"start": a, "end": b} for a, b in row] for row in segments]
    annotations = pa.table(
        {
            name: pa.array(column, ANNOTATIONS.schema.field(name).type)
            for name, column in (("segments", tiles), ("spans", [[]] * len(rows)))
        }
    )
    made = aligned(rollouts, annotations, np.ones(len(rows), bool), table, 0.5)
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in segments])))
    assert made.segment_offsets.tolist() == offsets.tolist()
    expected = []
    for row, bounds, first in zip(rows, segments, offsets, strict=False):
        own = table.token_segments(row, bounds) if bounds else np.full(len(row), -1)
        expected += np.where(own >= 0, own + first, -1).tolist()
    assert made.token_segment.tolist() == expected
    named = np.array(expected, dtype=int)
    assert made.segment_tokens.tolist() == (
        np.bincount(named[named >= 0], minlength=offsets[-1]).tolist()
    )

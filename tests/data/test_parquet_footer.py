"""The footer's stated sizes are those that pyarrow reads; garbage is a ValueError."""

from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.data.parquet_footer import column_chunks


def written(rows: int = 50) -> bytes:
    table = pa.table(
        {
            "text": [f"row {row}" for row in range(rows)],
            "ids": [list(range(row)) for row in range(rows)],
            "spans": [[{"start": row, "kind": "key"}] for row in range(rows)],
            "flag": [row % 2 == 0 for row in range(rows)],
            "reward": [None if row % 3 else 0.5 for row in range(rows)],
        }
    )
    sink = BytesIO()
    pq.write_table(table, sink, row_group_size=20)
    return sink.getvalue()


def test_stated_sizes_are_those_that_pyarrow_reads():
    content = written()
    metadata = pq.read_metadata(BytesIO(content))
    groups = list(column_chunks(BytesIO(content), metadata.num_columns))
    assert len(groups) == metadata.num_row_groups == 3
    for index, chunks in enumerate(groups):
        group = metadata.row_group(index)
        expected = [group.column(number) for number in range(metadata.num_columns)]
        assert [(c.rows, c.values, c.uncompressed_bytes) for c in chunks] == [
            (group.num_rows, c.num_values, c.total_uncompressed_size) for c in expected
        ]


def test_a_row_group_with_another_number_of_columns_is_refused():
    with pytest.raises(ValueError, match="a row group has 6 columns, the schema 5"):
        list(column_chunks(BytesIO(written()), 5))


CONTENT = written(3)


@given(
    st.binary(max_size=80)
    | st.binary(max_size=60).map(lambda b: b + len(b).to_bytes(4, "little") + b"PAR1")
    | st.builds(
        lambda at, byte: CONTENT[:at] + bytes([byte]) + CONTENT[at + 1 :],
        st.integers(0, len(CONTENT) - 1),
        st.integers(0, 255),
    )
)
def test_garbage_is_a_value_error(content):
    try:
        list(column_chunks(BytesIO(content), 6))
    except ValueError:
        return

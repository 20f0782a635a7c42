"""Parquet that unfolds to more than its size allows is refused before it is unfolded."""

import subprocess
import sys
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.data import sources
from trace_opd.data.parquet_reader import read_batches, read_table, require_bounded
from trace_opd.data.store import Dataset, Store
from trace_opd.schemas.configs import FilesSource
from trace_opd.schemas.errors import DamagedFile, InputError

MIB = 1 << 20


def repeated(value: str, times: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.nulls(times, pa.int32()).fill_null(0), [value])


def in_one_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays([0, len(values)], values)


def table(problem: pa.Array) -> pa.Table:
    return pa.table({"problem": problem, "answer": repeated("1", len(problem))})


# Each unfolds to more than 256 MiB, or to more rows than bytes.
BOMBS = {
    "dictionary": (table(repeated("x" * MIB, 65536)), True),
    "compression": (table(pa.array(["x" * MIB] * 260)), False),
    "run lengths": (table(repeated("x", 2_000_000)), True),
    "list": (table(in_one_list(pa.nulls(36_000_000, pa.int8()).fill_null(0))), True),
    "dictionary in a list": (
        table(in_one_list(pa.StructArray.from_arrays([repeated("x" * MIB, 4096)], ["text"]))),
        True,
    ),
}


@pytest.fixture(scope="session")
def bombs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    for name, (made, use_dictionary) in BOMBS.items():
        pq.write_table(
            made, folder / f"{name}.parquet", compression="zstd", use_dictionary=use_dictionary,
            write_statistics=False, store_schema=False, row_group_size=1 << 40,
        )  # fmt: skip
    return folder


PROGRAM = """
import resource, sys
from pathlib import Path
from trace_opd.data.parquet_reader import read_batches, read_table, require_bounded
from trace_opd.schemas.errors import InputError

limit = 1500 << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    for read in (read_table, require_bounded, lambda *a: list(read_batches(*a, ["problem"]))):
        with path.open("rb") as file:
            try:
                read(file, path.name)
            except InputError as error:
                print(error)
"""


def test_a_bomb_is_refused_within_little_memory(bombs):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(bombs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * len(BOMBS)
    for name in BOMBS:
        about = [line for line in lines if line.startswith(f"{name}.parquet: ")]
        assert len(about) == 3
        assert all("unfolds from" in line or "claims 2,000,000 rows" in line for line in about)


@pytest.mark.parametrize("name", BOMBS)
def test_a_source_and_a_part_refuse_a_bomb(bombs, name, tmp_path):
    path = bombs / f"{name}.parquet"
    with pytest.raises(InputError, match=r"unfolds from|claims|give text or a number"):
        list(sources.rows(FilesSource(kind="files", path=str(path)), 0))
    store = Store(tmp_path)
    store.files.write("rollouts/x/part-00000.parquet", path.read_bytes())
    with pytest.raises(DamagedFile, match=r"unfolds from|claims"):
        Dataset(store.files, "rollouts", "x", {"table": "rollouts"}).read_part(0)


def test_what_repeats_within_bounds_is_read_as_it_is():
    made = table(repeated("x" * MIB, 100)).append_column("n", pa.array(range(100)))
    nested = pa.array([[{"text": "a"}, {"text": None}], None] * 50)
    made = made.append_column("spans", nested).append_column("none", pa.nulls(100, pa.string()))
    sink = BytesIO()
    pq.write_table(made, sink)
    expected = pq.read_table(BytesIO(sink.getvalue()))
    read = read_table(BytesIO(sink.getvalue()), "x")
    assert read.equals(expected)
    assert read.schema.equals(expected.schema)
    picked = read_table(BytesIO(sink.getvalue()), "x", ["n", "problem"])
    assert picked.column_names == ["n", "problem"]
    batches = list(read_batches(BytesIO(sink.getvalue()), "x", ["problem", "spans"]))
    assert pa.Table.from_batches(batches).equals(expected.select(["problem", "spans"]))
    require_bounded(BytesIO(sink.getvalue()), "x")
    with pytest.raises(InputError, match="there is no column m"):
        read_table(BytesIO(sink.getvalue()), "x", ["m"])

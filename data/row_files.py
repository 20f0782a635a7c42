"""Rows of the files that people have: Parquet, JSON lines, a JSON array, CSV, TSV; also compressed.

Source `files` and the readers of human labels call `file_rows`. A row that can't be read is given
as a `BadRow`, so that the caller may skip it.
"""

import csv
import posixpath
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.contract import parquet_errors
from ..schemas.errors import InputError
from .compressed import COMPRESSED, bare_name, unpacked
from .input_files import read_json, text_lines
from .parquet_reader import read_batches

_MOST_ARRAY_CHARS = 256 << 20  # a JSON array is parsed in one piece
_MOST_RECORD_CHARS = 16 << 20
_LARGE_BATCH_BYTES = 64 << 20
_FIRST_PLACES = 5
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (".parquet", *JSON_SUFFIXES, ".csv", ".tsv")
# Keys of an object that holds the rows.
_WRAPPERS = ("data", "rows", "examples", "problems", "questions", "train", "test")
KINDS = "a Parquet, JSONL, JSON, CSV or TSV file, a folder or a glob of them"

csv.field_size_limit(_MOST_RECORD_CHARS)


class BadRow(InputError):
    """A row that can't be used. place: file and row; what: its fault, the same text for all rows
    of the same fault."""

    place = what = ""


def bad_row(place: str, what: str, mend: str, shown: str | None = None) -> BadRow:
    """shown: the fault with what is particular to this row."""
    error = BadRow(f"{place}: {shown or what}; {mend}")
    error.place, error.what = place, what
    return error


class SkippedRows:
    """Counts the rows that were skipped, by fault, with the places of the first of each."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, row: BadRow) -> None:
        self._counts[row.what] = self._counts.get(row.what, 0) + 1
        places = self._places.setdefault(row.what, [])
        if len(places) < _FIRST_PLACES:
            places.append(row.place)

    @property
    def rows(self) -> int:
        return sum(self._counts.values())

    def sentence(self) -> str:
        return "; ".join(skipped_faults(self.figures()))

    def figures(self) -> dict[str, Any]:
        """{fault: {"rows": number, "first": places}}, for a dataset's summary."""
        return {
            what: {"rows": count, "first": self._places[what]}
            for what, count in self._counts.items()
        }


def skipped_faults(figures: dict[str, Any]) -> list[str]:
    """ "2 rows: column 'answer' is empty (p.jsonl, row 3; p.jsonl, row 9)", for each fault."""
    faults = []
    for what, found in figures.items():
        more = ["…"] if found["rows"] > len(found["first"]) else []
        number = f"{found['rows']} row{'s' if found['rows'] > 1 else ''}"
        faults.append(f"{number}: {what} ({'; '.join([*found['first'], *more])})")
    return faults


Rows = Iterator[tuple[int, dict[str, Any] | BadRow]]


def is_known(path: str) -> bool:
    """Whether a file's name ends as those that `file_rows` reads."""
    return posixpath.splitext(bare_name(path))[1].lower() in SUFFIXES


def file_rows(file: Any, name: str, columns: Sequence[str] | None = None) -> Rows:
    """The rows of an open file by its name's suffix, numbered from 0. A row of JSON lines has its
    line's number.

    columns: the ones to read of a Parquet file; default: all.

    Raises:
        InputError: the file can't be read, or is of another kind.
    """
    bare = bare_name(name)
    suffix = posixpath.splitext(bare)[1].lower()
    if suffix == ".parquet" and bare == name:
        return parquet_rows(file, name, columns)
    if suffix == ".parquet":
        raise InputError(f"{name}: is a compressed Parquet file; unpack it")
    if suffix in JSON_SUFFIXES:
        return _json_rows(unpacked(file, name), name, suffix == ".json")
    if suffix in (".csv", ".tsv"):
        return _csv_rows(unpacked(file, name), name, "\t" if suffix == ".tsv" else None)
    raise InputError(
        f"{name}: ends in {posixpath.splitext(name)[1] or 'nothing'!r}; give a file that ends in "
        f"{', '.join(SUFFIXES)}, or one of these with {', '.join(COMPRESSED)}"
    )


def parquet_schema(file: Any, name: str) -> pa.Schema:
    with parquet_errors(name):
        return pq.ParquetFile(file).schema_arrow


def parquet_rows(file: Any, name: str, columns: Sequence[str] | None) -> Rows:
    if columns is None:
        columns = parquet_schema(file, name).names
    row = 0
    for batch in read_batches(file, name, columns):
        # Row by row if cells are large, since their text is held twice.
        step = 1 if batch.nbytes > _LARGE_BATCH_BYTES else batch.num_rows
        for first in range(0, batch.num_rows, step):
            for value in batch.slice(first, step).to_pylist():
                yield row, value
                row += 1


# --- JSON ---


def _json_rows(file: Any, name: str, one_value: bool) -> Rows:
    """JSON lines, an array, or an object that holds one. one_value: the suffix allows an object
    over several lines."""
    # Arrow's JSON reader needs one type per column, but answers are often a number in one line and
    # text in the next.
    lines = text_lines(file, name, _MOST_ARRAY_CHARS if one_value else None)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        return iter(())
    text = first[1].strip()
    if text.startswith("version https://git-lfs"):
        raise InputError(f"{name}: is a Git LFS pointer, not the data; run git lfs pull")
    everything = chain([first], lines)
    if text.startswith("["):
        held = list(_bounded(everything, name))
        try:
            return _array_rows(read_json("".join(line for _, line in held)), name)
        except ValueError as error:
            raise InputError(f"{name}: is not JSON ({error}); load it again") from None
    value = _value_of(text)
    if value is None and one_value:
        held = list(_bounded(everything, name))
        value = _value_of("".join(line for _, line in held))
        return _line_rows(iter(held), name) if value is None else _object_rows(value, name)
    if isinstance(value, dict) and _list_in(value) is not None:
        second = next((line for line in lines if line[1].strip()), None)
        if second is None:
            return _object_rows(value, name)
        everything = chain([first, second], lines)
    return _line_rows(everything, name)


def _value_of(text: str) -> Any:
    try:
        return read_json(text)
    except ValueError:
        return None


def _line_rows(lines: Iterator[tuple[int, str]], name: str) -> Rows:
    """The objects of JSON lines; blank lines are skipped."""
    for row, line in lines:
        if not line.strip():
            continue
        try:
            value = read_json(line)
        except ValueError as error:
            what, place = "is not JSON", f"{name}, row {row}"
            yield row, bad_row(place, what, "mend the line", f"{what} ({error})")
        else:
            yield row, _object(value, name, row, "line")


def _object(value: Any, name: str, row: int, unit: str) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return bad_row(f"{name}, row {row}", "is not a JSON object", f"write one object per {unit}")


def _array_rows(values: list[Any], name: str) -> Rows:
    return ((row, _object(value, name, row, "row")) for row, value in enumerate(values))


def _object_rows(value: Any, name: str) -> Rows:
    """The rows of an object that holds them under a key such as "data"."""
    found = _list_in(value) if isinstance(value, dict) else None
    if found is None:
        keys = ", ".join(value)[:200] if isinstance(value, dict) else type(value).__name__
        raise InputError(
            f"{name}: is one JSON value without a list of rows ({keys}); write a JSON array of "
            'objects, {"data": [...]}, or one object per line'
        )
    return _array_rows(found, name)


def _list_in(value: dict[str, Any]) -> list[Any] | None:
    lists = (value.get(key) for key in _WRAPPERS)
    return next((v for v in lists if isinstance(v, list) and v and isinstance(v[0], dict)), None)


def _bounded(lines: Iterator[tuple[int, str]], name: str) -> Iterator[tuple[int, str]]:
    size = 0
    for row, line in lines:
        size += len(line)
        if size > _MOST_ARRAY_CHARS:
            raise InputError(
                f"{name}: is a JSON array of more than {_MOST_ARRAY_CHARS:,} characters; write "
                "JSON lines"
            )
        yield row, line


# --- CSV and TSV ---


def _csv_rows(file: Any, name: str, delimiter: str | None) -> Rows:
    """Cells as text, by the names in the first row. delimiter: by default the most frequent of
    comma, semicolon and tab in the first row."""
    lines = (line for _, line in text_lines(file, name))
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return
    if delimiter is None:
        delimiter = max(",;\t", key=first.count)
    record = _Record(chain([first], lines), name)
    reader = csv.reader(record, delimiter=delimiter, strict=True)
    try:
        header = [cell.strip() for cell in next(reader)]
    except csv.Error as error:
        raise InputError(f"{name}: its first row is not CSV ({error}); mend it") from None
    if twice := [cell for cell in header if cell and header.count(cell) > 1]:
        raise InputError(f"{name}: its first row names column {twice[0]!r} twice; rename one")
    row = -1
    while True:
        record.size = 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            row += 1
            what, place = "is not CSV", f"{name}, row {row}"
            yield row, bad_row(place, what, "mend its quotes", f"{what} ({error!s:.80})")
            continue
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        row += 1
        if len(cells) == len(header):
            yield row, dict(zip(header, cells, strict=True))
        else:
            yield (
                row,
                bad_row(
                    f"{name}, row {row}",
                    "has another number of cells than the first row",
                    f"quote cells that hold {delimiter!r} or line ends",
                    f"has {len(cells)} cells, the first row {len(header)}",
                ),
            )


class _Record:
    """Lines for the CSV reader, which joins those of a quoted cell: their size is limited."""

    def __init__(self, lines: Iterator[str], name: str) -> None:
        self._lines, self._name, self.size = lines, name, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.size += len(line)
        if self.size > _MOST_RECORD_CHARS:
            raise InputError(
                f"{self._name}: holds a row of more than {_MOST_RECORD_CHARS:,} characters; close "
                "its quotes or split it"
            )
        return line

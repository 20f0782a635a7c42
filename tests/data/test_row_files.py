"""Files as people have them: formats, compression, folders; rows that can't be read."""

import bz2
import gzip
import io
import json
import lzma

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.data import compressed, row_files, sources
from trace_opd.data.compressed import unpacked
from trace_opd.data.row_files import BadRow, SkippedRows, file_rows
from trace_opd.data.step_labels import json_rows
from trace_opd.schemas.configs import FilesSource
from trace_opd.schemas.errors import InputError

ROWS = [{"problem": "1 + 1?", "answer": "2"}, {"problem": 'say "é",\nthen 4', "answer": "4"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'problem,answer\n1 + 1?,2\n"say ""é"",\nthen 4",4\n'
PACK = {
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def parquet(rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def rows_of(content: str | bytes, name: str) -> list:
    held = content if isinstance(content, bytes) else content.encode()
    return [row for _, row in file_rows(io.BytesIO(held), name)]


def read(path, **fields):
    return list(sources.rows(FilesSource(kind="files", path=path, **fields), 0))


FILES = {
    "p.jsonl": LINES,
    "p.ndjson": LINES + "\n",
    "P.JSONL": LINES,
    "lines.json": LINES,
    "p.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS),
    "data.json": json.dumps({"version": "1.0", "data": ROWS}),
    "indented-data.json": json.dumps({"data": ROWS}, indent=1),
    "examples.json": json.dumps({"examples": ROWS}),
    "p.csv": CSV,
    "semicolons.csv": CSV.replace("problem,answer", "problem;answer")
    .replace("1?,2", "1?;2")
    .replace('",4', '";4'),
    "tabs.csv": CSV.replace("m,a", "m\ta").replace("?,2", "?\t2").replace('",4', '"\t4'),
    "p.tsv": CSV.replace("m,a", "m\ta").replace("?,2", "?\t2").replace('",4', '"\t4'),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows_with_bom_or_windows_ends_or_compressed(name):
    text = FILES[name]
    assert rows_of(text, name) == ROWS
    assert rows_of("\ufeff" + text, name) == ROWS
    assert rows_of(text.replace("\n", "\r\n"), name) == ROWS
    for suffix, pack in PACK.items():
        assert rows_of(pack(text.encode()), name + suffix) == ROWS
        both = pack(text.encode()) + pack(b"\n")  # as `cat` joins two files
        assert rows_of(both, name + suffix) == ROWS


def test_parquet_gives_the_same_rows():
    assert rows_of(parquet(ROWS), "p.parquet") == ROWS
    with pytest.raises(InputError, match="is a compressed Parquet file; unpack it"):
        rows_of(gzip.compress(parquet(ROWS)), "p.parquet.gz")


def test_a_chat_on_one_line_is_a_row_and_no_object_of_rows():
    row = {"prompt": [{"role": "user", "content": "1+1"}], "reward_model": {"ground_truth": "2"}}
    assert rows_of(json.dumps(row), "one.jsonl") == [row]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", "x", r"ends in '.txt'; give a file that ends in .*\.csv.*\.zst"),
        ("p.csv", "a,a\n1,2\n", "names column 'a' twice"),
        ("p.csv", '"a"b,c\n', "its first row is not CSV"),
        ("p.csv", "problem\n1\n".encode("utf-16"), "is not UTF-8 text; save it as UTF-8"),
        ("p.json", "[1, 2", "is not JSON"),
        ("p.json", '{"a": {"b": 1},\n"c": 1}', r"is one JSON value without a list of rows \(a, c"),
        ("p.jsonl", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        *((f"p.jsonl{suffix}", b"no such format", "is damaged") for suffix in PACK),
        *((f"p.jsonl{s}", pack(LINES.encode())[:-4], "is damaged") for s, pack in PACK.items()),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 16 else "",
)
def test_a_file_that_can_not_be_read_is_one_sentence(name, content, sentence):
    with pytest.raises(InputError, match=sentence) as refused:
        rows_of(content, name)
    assert str(refused.value).startswith(f"{name}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("p.jsonl", LINES + "nope\n[1]\n", {2: "is not JSON", 3: "is not a JSON object"}),
        ("p.json", json.dumps([*ROWS, 1]), {2: "is not a JSON object"}),
        ("p.csv", CSV + "1\n1,2,3\n" + '"a"b,2\n', {2: "number of", 3: "number of", 4: "not CSV"}),
        ("open.csv", CSV + '"never closed,2\n1+1,2\n', {2: "is not CSV"}),
    ],
)
def test_a_bad_row_has_its_place_and_the_rows_after_it_are_read(name, content, bad):
    found = list(file_rows(io.BytesIO(content.encode()), name))
    faults = {row: value for row, value in found if isinstance(value, BadRow)}
    assert [value for _, value in found if not isinstance(value, BadRow)] == ROWS
    assert faults.keys() == bad.keys()
    for row, fault in faults.items():
        assert bad[row] in fault.what
        assert fault.place == f"{name}, row {row}"
        assert str(fault).startswith(f"{name}, row {row}: ")


@pytest.mark.parametrize("suffix", PACK)
def test_what_unpacks_too_far_is_refused_before_it_is_held(suffix, monkeypatch):
    monkeypatch.setattr(compressed, "_MOST_UNPACKED_BYTES", 1 << 20)
    bomb = PACK[suffix](b"0" * (16 << 20))
    with pytest.raises(InputError, match=r"unpacks to more than [\d,]+ bytes"):
        unpacked(io.BytesIO(bomb), f"p.csv{suffix}").read()
    monkeypatch.setattr(compressed, "_MOST_UNPACKED_TIMES", 1 << 20)
    assert len(unpacked(io.BytesIO(bomb), f"p.csv{suffix}").read()) == 16 << 20


def test_a_record_or_an_array_of_any_size_is_refused(monkeypatch):
    monkeypatch.setattr(row_files, "_MOST_RECORD_CHARS", 1000)
    with pytest.raises(InputError, match="a row of more than 1,000 characters"):
        rows_of("a,b\n" + '"x\n",' * 300, "p.csv")
    monkeypatch.setattr(row_files, "_MOST_ARRAY_CHARS", 100)
    with pytest.raises(InputError, match="more than 100 characters"):
        rows_of(json.dumps(ROWS * 9, indent=1), "p.json")


def test_folders_globs_and_lists_name_their_files_below_the_common_folder(tmp_path):
    (tmp_path / "set" / "deep").mkdir(parents=True)
    (tmp_path / "set" / ".hidden").mkdir()
    for place, problem in (("set/b.csv", "b"), ("set/deep/a.jsonl.gz", "a"), ("c.json", "c")):
        text = json.dumps([{"problem": problem, "answer": 1}])
        content = f"problem,answer\n{problem},1\n" if place.endswith("csv") else text
        path = tmp_path / place
        path.write_bytes(gzip.compress(content.encode()) if "gz" in place else content.encode())
    for unread in ("set/README.md", "set/.hidden/x.csv", "set/.x.csv"):
        (tmp_path / unread).write_text("not a table")
    folder, single = str(tmp_path / "set"), str(tmp_path / "c.json")
    found = [(row["problem"], row["source"]) for row in read(folder)]
    assert found == [("b", "b.csv"), ("a", "deep/a.jsonl.gz")]
    found = [(row["problem"], row["source"]) for row in read([single, folder, single])]
    assert found == [("c", "c.json"), ("b", "set/b.csv"), ("a", "set/deep/a.jsonl.gz")]
    assert [row["problem"] for row in read(str(tmp_path / "*"))] == ["c", "b", "a"]
    with pytest.raises(InputError, match="is an empty list"):
        read([])
    with fsspec.open("memory://x.csv", "w") as file:
        file.write("problem,answer\n1,1\n")
    with pytest.raises(InputError, match="several file systems"):
        read([single, "memory://x.csv"])


def test_labels_of_people_are_read_from_the_same_formats(tmp_path):
    rows = [{"id": "gsm8k-0", "steps": ["a", "b"], "label": 1}]
    contents = {
        "a.json": "\ufeff" + json.dumps({"data": rows}),
        "b.jsonl": json.dumps(rows[0]) + "\r\n",
        "c.json.gz": gzip.compress(json.dumps(rows).encode()),
        "d.parquet": parquet(rows),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert [row for _, row in json_rows(str(tmp_path / name))] == rows


def test_skipped_rows_are_counted_by_fault_with_the_first_places():
    skipped = SkippedRows()
    for row in file_rows(io.BytesIO(b"x\n" * 7 + b"[]\n"), "p.jsonl"):
        assert isinstance(row[1], BadRow)
        skipped.add(row[1])
    assert skipped.rows == 8
    assert skipped.figures()["is not JSON"] == {
        "rows": 7,
        "first": [f"p.jsonl, row {row}" for row in range(5)],
    }
    assert skipped.sentence().endswith("row 4; …); 1 row: is not a JSON object (p.jsonl, row 7)")


def test_a_folder_leaves_out_the_stores_below_it(tmp_path):
    (tmp_path / "p.jsonl").write_text(LINES)
    held = tmp_path / "runs" / "store" / "problems" / ("0" * 16)
    held.mkdir(parents=True)
    (held.parents[1] / "aliases.json").write_text('{"a": "problems/0"}')
    for name in ("manifest.json", "part-00000.parquet"):
        (held / name).write_bytes(b"{}")
    assert len(read(str(tmp_path))) == len(ROWS)
    (held / "part-00000.parquet").write_bytes(parquet(ROWS))
    assert len(read(str(held / "part-*.parquet"))) == len(ROWS)  # named, it is read

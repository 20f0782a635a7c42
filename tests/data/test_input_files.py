"""What is no ordinary file, does not end or is not reached is one sentence, at once."""

import bz2
import gzip
import json
import lzma
import os
import socket
import zipfile

import pyarrow as pa
import pytest

from trace_opd.data import compressed, input_files, sources
from trace_opd.data.input_files import digest, find_files
from trace_opd.data.step_labels import json_rows
from trace_opd.schemas.configs import FilesSource, HubSource
from trace_opd.schemas.errors import InputError

ROW = json.dumps({"problem": "1+1?", "answer": "2"}) + "\n"

PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


@pytest.fixture
def odd_places(tmp_path):
    """Paths by kind, none of which holds an ordinary file."""
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "zero.jsonl").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jsonl"))
    with (tmp_path / "sparse.jsonl").open("wb") as file:
        file.truncate(20 << 30)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/dev/zero", "is a device, not a regular file"),
        ("file:///dev/zero", "is a device, not a regular file"),
        ("zip://x.jsonl::/dev/zero", "is a device, not a regular file"),
        ("{}/zero.jsonl", "is a device, not a regular file"),
        ("{}/fifo.jsonl", "is a pipe, not a regular file"),
        ("{}/socket.jsonl", "is a socket, not a regular file"),
        ("{}/folder.jsonl", "is a folder, not a regular file|is a folder, and holds no such file"),
        ("{}/sparse.jsonl", "is larger than 16 GiB; split it"),
        ("{}/dangling.jsonl", "no such file"),
        ("{}/loop.jsonl", "no such file"),
        ("{}/none.jsonl", "no such file"),
        ("{}/z*.jsonl", "is a device, not a regular file"),
        ("{}/devices", "is a device, not a regular file|is a folder, not a regular file"),
        ("x" * 5000, "no such file"),
        ("a\0b", "no such file|cannot be read"),
        ("", "no such file|is a folder"),
        ("foo://x", "cannot be read (Protocol not known: foo)"),
        ("reference://x", "cannot be read"),
        ("sftp://127.0.0.1/x", "cannot be read"),
        ("zip://x.jsonl::{}/none.zip", "cannot be read"),
        ("tar://x::/etc/passwd", "cannot be read"),
        ("http://127.0.0.1:1/x.jsonl", "no such file|cannot be read"),
        ("ftp://127.0.0.1:1/x.jsonl", "cannot be read"),
    ],
    ids=lambda value: value[:30],
)  # fmt: skip
def test_what_is_no_ordinary_file_is_refused_by_every_reader(odd_places, path, what):
    path = path.format(odd_places)
    source = FilesSource(kind="files", path=path)
    for read in (
        lambda: sources.identity(source),
        lambda: list(sources.rows(source, 0)),
        lambda: list(json_rows(path)),
    ):
        with pytest.raises(InputError) as refused:
            read()
        assert any(part in str(refused.value) for part in what.split("|")), refused.value
        assert "\n" not in str(refused.value)


def test_a_file_of_the_kernel_that_would_block_is_read_as_empty(tmp_path):
    path = tmp_path / "kernel.jsonl"
    path.symlink_to("/proc/kmsg")  # a regular file of no size, whose reader waits for messages
    source = FilesSource(kind="files", path=str(path))
    with pytest.raises(InputError, match=r"holds no rows|no such file"):
        list(sources.rows(source, 0))


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files, "_MOST_LINE_CHARS", 1000)
    path = tmp_path / "p.jsonl"
    path.write_text(ROW + '{"problem": "' + "x" * 1000)
    for read in (json_rows, lambda p: sources.rows(FilesSource(kind="files", path=p), 0)):
        with pytest.raises(InputError, match=r"p\.jsonl, row 1: is longer than 1,000 characters"):
            list(read(str(path)))


def test_a_stream_without_an_end_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text(ROW * 10)
    fs, (found,) = find_files(str(path), "a file")
    monkeypatch.setattr(input_files, "_MOST_FILE_BYTES", 100)
    with pytest.raises(InputError, match="is larger than"):
        digest(fs, found)


def test_a_cell_that_no_model_reads_is_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"problem": "x" * (5 << 20), "answer": "2"}))
    with pytest.raises(InputError, match=r"row 0: column 'problem' holds 5,242,880 characters"):
        list(sources.rows(FilesSource(kind="files", path=str(path)), 0))


@pytest.mark.parametrize("pack", ["gz", "bz2", "xz", "zip", "zst"])
def test_a_folder_of_the_hubs_layout_with_an_archive_that_unfolds_too_far_is_refused(
    tmp_path, monkeypatch, pack
):
    monkeypatch.setattr(compressed, "_MOST_UNPACKED_BYTES", 1000)
    monkeypatch.setattr(compressed, "_MOST_UNPACKED_TIMES", 2)
    path = tmp_path / f"train.jsonl.{pack}"
    content = ROW.encode() * 1000
    if pack == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train.jsonl", content)
    else:
        path.write_bytes(PACK[pack](content))
    source = HubSource(kind="hub", dataset=str(tmp_path))
    with pytest.raises(InputError, match=r"unpacks to more than"):
        sources.identity(source)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="is damaged"):
        sources.identity(source)

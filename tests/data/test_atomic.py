"""Atomic writes: what they refuse to replace."""

import os

import pytest

from trace_opd.data.atomic import write_atomic
from trace_opd.schemas.errors import InputError


@pytest.mark.parametrize("linked", [False, True], ids=["named", "linked"])
def test_a_written_file_replaces_no_pipe_or_device(tmp_path, linked):
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if linked:
        path = tmp_path / "report.html"
        path.symlink_to(pipe)
    with pytest.raises(InputError, match=r"is a device or a pipe; name a file"):
        write_atomic(path, b"text")
    assert pipe.is_fifo()
    assert path.is_symlink() is linked

"""A private file system in memory that a test fills up or makes read-only. Used by accidents.py."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A tmpfs mount; tests are skipped where the machine can't mount one."""

    def __init__(self, folder: Path) -> None:
        self.root, self._ballast = folder / "store", folder / "ballast"
        self._mount = folder
        self._options("size=256m")

    def _options(self, *options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", self._mount]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def leave(self, free: int) -> None:
        """Fill the disk until `free` bytes are left."""
        room = shutil.disk_usage(self._mount).free
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room - free)

    def make_room(self) -> None:
        self._ballast.unlink()

    def writable(self, yes: bool) -> None:
        mode = "rw" if yes else "ro"
        subprocess.run(["mount", "-o", f"remount,{mode}", self._mount], check=True)

    def close(self) -> None:
        subprocess.run(["umount", self._mount], check=True)


@contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    folder.mkdir()
    opened = Disk(folder)
    try:
        yield opened
    finally:
        opened.close()

"""Real ranks for the tests: processes of torchrun, gloo on the CPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLI = "trace_opd.pipelines.cli"


def launcher(ranks: int) -> list[str]:
    """The command that the arguments of `python` follow; one rank is no torchrun."""
    if ranks == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={ranks}"]


@contextmanager
def started(command: list, **variables: str) -> Iterator[subprocess.Popen]:
    """A process, which is killed with its children unless it has ended."""
    process = subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(ranks: int, *arguments: object, timeout: float = 300) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python ARGUMENTS` on so many ranks."""
    with started([*launcher(ranks), *arguments]) as process:
        out, error = process.communicate(timeout=timeout)
    return process.returncode, out, error


def children(process: subprocess.Popen) -> list[int]:
    """The process ids of torchrun's ranks, in their order."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ids = [int(child) for child in path.read_text().split()]
    return sorted(ids, key=_rank)


def _rank(process: int) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    ranks = [int(text[5:]) for text in variables if text.startswith(b"RANK=")]
    return ranks[0] if ranks else -1

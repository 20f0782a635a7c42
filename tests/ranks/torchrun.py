"""Real ranks for the tests on the CPU: processes of torchrun, or forks. Their groups are gloo's."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trace_opd.tests.kill.harness import Launcher

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "micro.yaml"
CLI = "trace_opd.pipelines.cli"
TORCHRUN = "torch.distributed.run"
OURS = f"{CLI}.torchrun"
SHORT = [
    "offline.steps=0",
    "online.steps=1",
    "online.group_size=2",
    "groups_per_step=2",
    "tracker=none",
]


@contextmanager
def started(
    ranks: int, *arguments: object, launcher: str = TORCHRUN, **variables: str
) -> Iterator[subprocess.Popen]:
    """`python ARGUMENTS` on so many ranks: one rank has no launcher. Killed in the end, if need be.

    launcher: a module, TORCHRUN or OURS.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", launcher, "--standalone", f"--nproc-per-node={ranks}"]
    process = subprocess.Popen(
        [*command, *(str(word) for word in arguments)],
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


def ended(
    ranks: int,
    *arguments: object,
    launcher: str = TORCHRUN,
    timeout: float = 300,
    **variables: str,
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    with started(ranks, *arguments, launcher=launcher, **variables) as process:
        out, error = process.communicate(timeout=timeout)
    return process.returncode, out, error


def forked(forks: Launcher, ranks: int, *arguments: object, program: Path | None = None) -> None:
    """`trace-opd ARGUMENTS`, or a program, to its end on so many ranks, with torchrun's variables.

    The ranks are forks of a process that has imported everything, and start at once.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    group["WORLD_SIZE"] = str(ranks)
    runs = [
        forks.start(
            *arguments,
            program=str(program) if program else None,
            environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {},
        )
        for rank in range(ranks)
    ]
    try:
        for run in runs:
            assert run.wait() == 0, run.err
    finally:
        for run in runs:
            if run.code is None:
                forks.kill(run, workers=False)


def children(process: subprocess.Popen) -> list[int]:
    """The process ids of torchrun's ranks, in their order."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ids = [int(child) for child in path.read_text().split()]
    return sorted(ids, key=_rank)


def _rank(process: int) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    ranks = [int(text[5:]) for text in variables if text.startswith(b"RANK=")]
    return ranks[0] if ranks else -1


def sentences(error: str) -> list[str]:
    """What the command line says at its end, by all ranks; without lines of progress."""
    said = [line for line in error.splitlines() if line.startswith("trace-opd: ")]
    return [line for line in said if not line.startswith("trace-opd: train: ")]


def annotator(name: str, seconds: int = 0) -> str:
    """The override for an annotator of own.py in online steps."""
    return f"online.annotator={{engine: '{HERE}/own.py:{name}', options: {{seconds: {seconds}}}}}"

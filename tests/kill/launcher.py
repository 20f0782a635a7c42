"""The launcher: a process that imports everything once and then forks runs of the command line, so
that a run starts in milliseconds. harness.py starts it.

Each line of JSON on standard input requests a run; each line on standard output reports a start or
an end. A run can send itself a signal (SIGKILL by default) just before its n-th change of the
store's files.
"""

import atexit
import gc
import json
import os

# Set before these packages are imported, as the command line does.
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import runpy
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai  # noqa: F401
import pyarrow.dataset  # noqa: F401
import tensorboard  # noqa: F401
import torch
import torch.utils.tensorboard
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from trace_opd.pipelines.cli import (
    main,
    show,  # noqa: F401
)
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.pipelines.training import plan_table  # noqa: F401
from trace_opd.pipelines.viewer import report_page  # noqa: F401

for _stage in REGISTRY.values():
    _stage.load()

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR

Prepare = Callable[[dict[str, Any]], None]


def _full(path: Any, folder: Any) -> Any:
    """An absolute path, also for a path that is relative to a folder's descriptor."""
    if (
        isinstance(path, str)
        and not path.startswith("/")
        and isinstance(folder, int)
        and folder >= 0
    ):
        return f"{Path(f'/proc/self/fd/{folder}').readlink()}/{path}"
    return path


def count_changes(root: str, last: int, number: int, log: Path) -> None:
    """Count changes of files below a folder; send signal `number` just before the `last` change.

    SIGKILL goes to this process alone, others to its group, as a terminal sends Ctrl-C. log: a file
    that gets one byte per change.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    done = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            path, _, flags = args
            if not (isinstance(flags, int) and flags & _WRITES):
                return
        elif event in _CHANGES:
            path = _full(args[0], args[-1])
        else:
            return
        if not isinstance(path, str | os.PathLike) or not str(path).startswith(root):
            return
        done += 1
        if done == last:
            (os.kill if number == signal.SIGKILL else os.killpg)(os.getpid(), number)
        os.write(descriptor, b".")

    sys.addaudithook(hook)


def run(asked: dict[str, Any], prepare: Prepare | None) -> None:
    """Run the command line, or a program, in this forked process and exit."""
    os.setsid()
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        path = os.devnull if descriptor == 0 else asked["output"][descriptor - 1]
        os.dup2(os.open(path, flags | (os.O_CREAT if descriptor else 0)), descriptor)
    torch.set_num_threads(asked["threads"])
    os.environ.update(asked.get("environment", {}))
    os.chdir(asked.get("cwd", "."))
    program = asked.get("program")
    sys.argv = [program or "trace-opd", *asked["args"]]
    if asked["store"]:
        log = Path(asked["output"][0]).with_suffix(".n")
        count_changes(asked["store"], asked["die_at"], asked["die_by"], log)
    if prepare is not None:
        prepare(asked)
    code = 1
    try:
        if program:
            runpy.run_path(program, run_name="__main__")
            code = 0
        else:
            main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    # Exit like the interpreter, but without unloading all modules: that would copy every page.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(prepare: Prepare | None = None) -> None:
    """Fork one run per line until standard input ends. prepare: called in each fork first."""
    buffer = b""
    print(json.dumps({"ready": os.getpid()}), flush=True)
    running = set()
    gc.collect()
    gc.freeze()  # otherwise a collection in a child would copy every page
    while True:
        readable, _, _ = select.select([0], [], [], 0.005 if running else None)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            running.discard(pid)
            print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)
        if not readable:
            continue
        if not (more := os.read(0, 1 << 16)):
            return
        *lines, buffer = (buffer + more).split(b"\n")
        for line in lines:
            if not (pid := os.fork()):
                run(json.loads(line), prepare)
            running.add(pid)
            print(json.dumps({"started": pid}), flush=True)


if __name__ == "__main__":
    serve()

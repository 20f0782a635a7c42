"""The process that forks the soak's runs (tests/kill/launcher.py), each with a fault of the file
system armed if it is asked for. Runs under shim.c by LD_PRELOAD; without it there are none."""

import atexit
import ctypes
import json
from pathlib import Path
from typing import Any

from trace_opd.tests.kill.launcher import serve


def arm(asked: dict[str, Any]) -> None:
    """asked["fault"]: kind and errno as in shim.c, and from which call on.

    The run leaves the numbers of its calls in a file .ops beside its output.
    """
    shim = ctypes.CDLL(None)
    if not asked["store"] or not hasattr(shim, "soak_arm"):
        return
    kind, error, first = asked.get("fault") or (0, 0, 0)
    shim.soak_arm(asked["store"].encode(), kind, error, ctypes.c_long(first))
    counted = Path(asked["output"][0]).with_suffix(".ops")

    def leave() -> None:
        counts = {"changes": shim.soak_changes(), "reads": shim.soak_reads()}
        counted.write_text(json.dumps(counts))

    atexit.register(leave)


if __name__ == "__main__":
    serve(arm)

"""The process that forks the soak's runs (a tests/kill/launcher.py), each with an optional file
fault. It runs with shim.c preloaded (LD_PRELOAD); without the shim there are no file faults.
"""

import atexit
import ctypes
import json
from pathlib import Path
from typing import Any

from trace_opd.tests.kill.launcher import serve


def arm(asked: dict[str, Any]) -> None:
    """asked["fault"]: kind and errno as in shim.c, and the number of the first call that fails.

    The run writes its numbers of calls to a file .ops next to its output.
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

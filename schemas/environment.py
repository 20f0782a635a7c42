"""What environment variables say: numbers such as torchrun's RANK, and the machine's cache folder.

ranks.py, identity.py and pipelines/ read them here.
"""

import os
from pathlib import Path

from .errors import InputError

_MOST = 1_000_000


def whole_number(variable: str, default: int) -> int:
    """The integer in an environment variable; `default` if it is unset.

    Raises:
        InputError: the value is no integer from 0 to a million.
    """
    text = os.environ.get(variable, "").strip() or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and int(text) <= _MOST):
        raise InputError(
            f"environment variable {variable} is {text!r:.80}, no whole number; unset it, or start "
            "with torchrun, which sets it"
        )
    return int(text)


def cache_folder(kind: str) -> Path:
    """A folder of this machine for files that any run can make again, one for all stores.

    $TRACE_OPD_CACHE, else trace-opd in the user's cache folder (XDG). kind: the folder in it.
    """
    if own := os.environ.get("TRACE_OPD_CACHE"):
        return Path(own) / kind
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(base) / "trace-opd" / kind


# Settings of Prefect: what the stages log (tokens and cost of a part) joins the flow run's log, and
# the embedded server may start slowly on a busy machine. prefect.yaml sets them for work pools.
PREFECT_DEFAULTS = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "trace_opd",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds
}

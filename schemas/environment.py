"""Numbers in environment variables, such as torchrun's RANK; ranks.py and pipelines/ read them
here.
"""

import os

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


# Settings of Prefect: what the stages log (tokens and cost of a part) joins the flow run's log, and
# the embedded server may start slowly on a busy machine. prefect.yaml sets them for work pools.
PREFECT_DEFAULTS = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "trace_opd",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds
}

"""The command line `trace-opd`: its commands, what they print and how they end.

The console script calls `main`, and so does `python -m trace_opd.pipelines.cli`.
"""

import os
import signal
import sys

from ...schemas.extras import missing_extra


def main() -> None:
    """Run the command of sys.argv and exit."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number, was in before.items():
        if was is not signal.SIG_IGN:
            # An interrupt within an import may print a traceback or be lost.
            signal.signal(number, lambda number, _: _end(number))
    try:
        from .commands import run  # imports take about a second
    except ModuleNotFoundError as error:
        if (sentence := missing_extra(error)) is None:
            raise
        print(f"trace-opd: {sentence}", file=sys.stderr)
        sys.exit(sentence.exit_code)
    for number, was in before.items():
        signal.signal(number, was)
    run()


def _end(number: int) -> None:
    try:
        os.write(2, b"\ntrace-opd: stopped before it began\n")
    finally:
        os._exit(128 + number)

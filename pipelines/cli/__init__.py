"""The command line `trace-opd`: its commands, what they print and how they end.

The console script calls `main`, and so does `python -m trace_opd.pipelines.cli`.
"""

import os
import signal


def main() -> None:
    """Run the command of sys.argv and exit."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number, was in before.items():
        if was is not signal.SIG_IGN:
            # An interrupt within an import may print a traceback or be lost.
            signal.signal(number, lambda number, _: _end(number))
    from .commands import run  # imports take about a second

    for number, was in before.items():
        signal.signal(number, was)
    run()


def _end(number: int) -> None:
    try:
        os.write(2, b"\ntrace-opd: stopped before it began\n")
    finally:
        os._exit(128 + number)

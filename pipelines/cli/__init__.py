"""The command line `trace-opd`: its commands, what they print and how they end.

The console script calls `main`, and so does `python -m trace_opd.pipelines.cli`.
"""

import sys


def main() -> None:
    """Run the command of sys.argv and exit."""
    try:
        from .commands import run  # imports take about a second
    except KeyboardInterrupt:
        sys.exit(130)
    run()

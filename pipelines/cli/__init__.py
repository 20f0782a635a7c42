"""The command line `trace-opd`: its commands, what they print and how they end.

The console script calls `main`, and so does `python -m trace_opd.pipelines.cli`.
"""

import sys

from ...schemas.extras import missing_extra


def main() -> None:
    """Run the command of sys.argv and exit."""
    try:
        from .commands import run  # imports take about a second
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (sentence := missing_extra(error)) is None:
            raise
        print(f"trace-opd: {sentence}", file=sys.stderr)
        sys.exit(sentence.exit_code)
    run()

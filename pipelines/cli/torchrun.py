"""torchrun for the command line. A training on many ranks ends as one on one rank does: with one
sentence and its exit code. Torchrun alone adds a traceback of its own, and its exit code is 1.

    python -m trace_opd.pipelines.cli.torchrun --nproc-per-node 8 train configs/qwen3-8b.yaml

Options before the command are torchrun's.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from .ending import print_error

_COMMAND_LINE = "trace_opd.pipelines.cli"


def main(arguments: list[str] | None = None) -> int:
    """Start the ranks, wait for their end, and return the exit code of the one that ended first."""
    options = parse_args(sys.argv[1:] if arguments is None else arguments)
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.training_script, options.module = _COMMAND_LINE, True
    logging.disable(logging.ERROR)  # torchrun's own lines: the ranks say why they end
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # a rank that is killed says nothing
            print_error(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}")
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())

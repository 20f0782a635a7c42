"""Exceptions that are not the program's fault: bad input, and a request to stop.

Every room raises them; the command line prints the sentence and exits with `exit_code`.
"""


class InputError(Exception):
    """Bad input from the user: one sentence with what, where, and how to mend it.

    The command line prints it without a traceback.
    """

    exit_code = 2


class Stopped(Exception):
    """The run received SIGTERM and kept everything that it had finished.

    143 is a shell's exit code for SIGTERM. The command line adds the command that continues.
    """

    exit_code = 143


class Interrupted(KeyboardInterrupt):
    """As `Stopped`, after Ctrl-C (SIGINT). A bare `except Exception` does not catch it."""

    exit_code = 130


class TooManyFailed(InputError):
    """A stage's dataset is finished and kept, but too many of its rows failed to continue."""

    exit_code = 1


class EngineEnded(InputError):
    """A sampler's engine process ended during a call: killed, out of memory, or stopped with the
    run.
    """


class DamagedFile(InputError):
    """A file of the store does not hold what was written.

    On a network store this may be temporary, unlike all other bad input.
    """

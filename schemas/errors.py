"""The exceptions that are no fault of the program: bad input, and being asked to stop."""


class InputError(Exception):
    """Bad input from the user: one sentence that says what, where, and how to mend it.

    The command line prints the sentence and exits with `exit_code`, without a traceback.
    """

    exit_code = 2


class Stopped(Exception):
    """The run was asked to stop (SIGTERM) and kept everything that it had finished.

    The command line prints the sentence and exits with code 143, as a shell reports SIGTERM.
    """

    exit_code = 143


class TooManyFailed(InputError):
    """A stage's dataset is finished and kept, but too much of it failed to go on with it unasked."""

    exit_code = 1


class EngineEnded(InputError):
    """A sampler's engine ended while it was asked: killed, out of memory, or told to stop with the run."""


class DamagedFile(InputError):
    """A file of the store does not hold what was written.

    It may pass where the store is on a network, as no other bad input does.
    """

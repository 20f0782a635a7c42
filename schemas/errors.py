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

    143 is a shell's exit code for SIGTERM.
    """

    exit_code = 143


class TooManyFailed(InputError):
    """A stage's dataset is finished and kept, but too many of its rows failed to continue."""

    exit_code = 1


class RowFault(InputError):
    """A row that its table's contract allows and other tables do not.

    table, rollout_id: where; a caller that knows the file names it.
    """

    def __init__(self, what: str, table: str = "", rollout_id: str = "") -> None:
        super().__init__(what if not rollout_id else f"rollout {rollout_id}: {what}")
        self.what, self.table, self.rollout_id = what, table, rollout_id


class OwnCodeError(InputError):
    """Code of the user's own raised an exception; the sentence names its line."""

    exit_code = 1


class EngineEnded(InputError):
    """A sampler's engine process ended during a call: killed, out of memory, or stopped with the
    run.
    """


class DamagedFile(InputError):
    """A file of the store does not hold what was written.

    On a network store this may be temporary, unlike all other bad input.
    """

"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(Exception):
    """Bad input from the user: one sentence that says what, where, and how to mend it.

    The command line prints the sentence and exits with code 2, without a traceback.
    """

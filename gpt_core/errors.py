"""The one exception for wrong input."""


class InputError(ValueError):
    """Something a person gave us (a file, a field, a flag, a checkpoint) is wrong.

    The message says what was wrong, where, and what to do. Commands print it without a traceback and
    exit with code 2.
    """

"""The one exception for bad input: a clear sentence for the user, exit code 2 on the command line."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the thing, says what was given and what to do about it.
    The entry points print it without a traceback and exit with code 2.
    """

"""The one exception for bad input: a clear sentence for the user, exit code 2 on the command line."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the thing, says what was given and what to do about it.
    The entry points print it without a traceback and exit with code 2.
    """


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise an `InputError` unless `value` is one of `choices`."""
    if value not in (known := list(choices)):
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")

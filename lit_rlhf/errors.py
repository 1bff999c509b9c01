"""The one exception for bad input: a clear sentence for the user, exit code 2 on the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the thing, says what was given and what to do about it.
    The entry points print it without a traceback and exit with code 2.
    """


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise an `InputError` unless `value` is one of `choices`."""
    if value not in (known := list(choices)):
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_number(name: str, value: Any, *, at_least: float | None = None, above: float | None = None) -> None:
    """Raise an `InputError` unless `value` is a finite number and not too small."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {value}")
    if at_least is not None and value < at_least:
        raise InputError(f"{name} must be at least {at_least}, got {value}")
    if above is not None and value <= above:
        raise InputError(f"{name} must be above {above}, got {value}")

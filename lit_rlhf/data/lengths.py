"""Rows that are longer than the model can read: found before anything is trained on, and never cut in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_rlhf.errors import InputError
from lit_rlhf.types import Row

LongRows = Literal["stop", "drop", "truncate"]
LONG_ROWS = ("stop", "drop", "truncate")


@dataclass(frozen=True)
class Room:
    """How long a row may be, how that is measured, and the words for it."""

    limit: int | None  # tokens
    length: Callable[[Row], int]
    what: str
    context: str
    advice: str


def room_of_prompts(module: Any) -> Room:
    """The room that the model has for prompts to sample from."""
    context = "the model's context less rollout.max_new_tokens leaves"
    return Room(
        module.prompt_limit, module.encoder.length, "prompts", context, "shorten them, lower rollout.max_new_tokens"
    )


def room_of_rows(module: Any) -> Room:
    """The room that it has for prompts with the completions that are trained on."""
    length = lambda row: module.encoder.length(row, module.completion_columns)  # noqa: E731
    return Room(module.row_limit, length, "rows with completion and EOS", "the model's context is", "shorten them")


def rows_too_long(rows: Sequence[Row], room: Room, which: str, then: LongRows) -> set[int]:
    """The numbers of the rows that do not fit.

    Args:
        rows: measured.
        room: for each of them.
        which: rows they are, for messages.
        then: what is to be done with those that do not fit.

    Raises:
        InputError: there are some and `then` is `"stop"`; or they cannot be helped.
    """
    if room.limit is None:
        return set()
    long = {i: length for i, row in enumerate(rows) if (length := room.length(row)) > room.limit}
    if long and then == "stop":
        raise InputError(
            f"{len(long)} of {len(rows)} {which} {room.what} do not fit the model: the longest has "
            f"{max(long.values())} tokens, and {room.context} {room.limit}; {room.advice}, leave them out with "
            "data.long_rows=drop or cut them with data.long_rows=truncate"
        )
    if long and then == "truncate" and room.limit < 2:
        raise InputError(f"{which} {room.what} cannot be cut to fit: {room.context} {room.limit}; {room.advice}")
    if then == "drop" and 0 < len(rows) == len(long):
        raise InputError(f"none of the {len(rows)} {which} {room.what} fits the model's context; use another model")
    return set(long)

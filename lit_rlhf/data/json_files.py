"""Rows of JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_rlhf.data.columns import kind_of
from lit_rlhf.errors import InputError

_ACCEPTED = "a .jsonl file (one JSON object per line) or a .json file (a list of objects)"


def read_json(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row's place, for messages, and its value.

    Args:
        file: a `.jsonl` file, one JSON object per line, or a `.json` file holding a list of objects.

    Raises:
        InputError: names the file, the line and what is wrong with it.
    """
    text = _text(file)
    if not text.strip():
        raise InputError(f"{file} is empty; expected {_ACCEPTED}")
    if file.suffix.lower() == ".json":
        values = _json(text, f"{file}, line", 1)
        if not isinstance(values, list):
            raise InputError(f"{file} holds {kind_of(values)}; expected a list of objects, or the suffix .jsonl")
        yield from ((f"{file}, row {n}", value) for n, value in enumerate(values, 1))
        return
    for n, line in enumerate(text.split("\n"), 1):  # splitlines would also break at characters JSON allows in a text
        if line.strip():
            yield f"{file}, line {n}", _json(line, f"{file}, line", n)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first row
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not a text file (byte {error.start} is not UTF-8); expected {_ACCEPTED}"
        ) from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); expected {_ACCEPTED}") from error


def _json(text: str, place: str, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        found = f"{error.msg.lower()} at column {error.colno}"
        line += error.lineno - 1
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting, a key given twice
        found = str(error)
    raise InputError(f"{place} {line}: not valid JSON, {found}; expected {_ACCEPTED}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no part is lost in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found

"""Rows of a dataset file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.types import Row

_SUFFIXES = (".jsonl", ".json")
_ACCEPTED = "a .jsonl file (one JSON object per line) or a .json file (a list of objects)"


def read_rows(path: str | Path) -> list[Row]:
    """Read a dataset file whose rows have a string `prompt`.

    Reads a `.jsonl` file, one JSON object per line, or a `.json` file holding a list of objects. Rows in
    GSM8K's own format (a `question`, and an `answer` that ends in `#### 72`) get the columns of the tasks
    here: `prompt` is the question, `answer` the bare number without thousands commas, `solution` the whole
    answer text; what else the row has stays.

    Raises:
        InputError: names the file, the line and what is wrong with it.
    """
    file = _existing(Path(path).expanduser())
    rows: list[Row] = []
    for where, value in _values(file, _text(file)):
        row = _checked(value, where)
        if rows and row.keys() != rows[0].keys():
            raise InputError(
                f"{where}: the columns are {_listed(row)}, those of the first row are {_listed(rows[0])}; "
                f"all rows need the same columns"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{file} has no rows; expected at least one object with a 'prompt'")
    return rows


def _existing(file: Path) -> Path:
    if file.is_dir():
        raise InputError(f"{file} is a folder, and folders are not read yet; expected {_ACCEPTED}")
    if file.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"{file} cannot be read: parquet files, folders and datasets of the Hub are not read yet; "
            f"expected {_ACCEPTED}"
        )
    if not file.exists():
        siblings = [f.name for f in file.parent.glob("*") if f.suffix.lower() in _SUFFIXES]
        nearest = difflib.get_close_matches(file.name, siblings, n=1, cutoff=0.0)
        hint = f"the nearest file beside it is {nearest[0]}" if nearest else f"expected {_ACCEPTED}"
        raise InputError(f"{file} does not exist; {hint}")
    return file


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first row
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not a text file (byte {error.start} is not UTF-8); expected {_ACCEPTED}"
        ) from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); expected {_ACCEPTED}") from error


def _values(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield each row's place, for messages, and its JSON value."""
    if not text.strip():
        raise InputError(f"{file} is empty; expected {_ACCEPTED}")
    if file.suffix.lower() == ".json":
        values = _json(text, f"{file}, line", 1)
        if not isinstance(values, list):
            raise InputError(f"{file} holds {_kind(values)}; expected a list of objects, or the suffix .jsonl")
        yield from ((f"{file}, row {n}", value) for n, value in enumerate(values, 1))
        return
    for n, line in enumerate(text.split("\n"), 1):  # splitlines would also break at characters JSON allows in a text
        if line.strip():
            yield f"{file}, line {n}", _json(line, f"{file}, line", n)


def _json(text: str, place: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = f"{error.msg.lower()} at column {error.colno}"
        line += error.lineno - 1
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        found = str(error)
    raise InputError(f"{place} {line}: not valid JSON, {found}; expected {_ACCEPTED}")


def _checked(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {_kind(value)}; expected an object with a 'prompt'")
    row = _from_gsm8k(value) if _is_gsm8k(value) else value
    if "prompt" not in row:
        raise InputError(
            f"{where}: no column 'prompt' among {_listed(row)}; expected 'prompt', "
            f"or GSM8K's 'question' and 'answer' with '#### ' before the number"
        )
    prompt = row["prompt"]
    if isinstance(prompt, list):
        raise InputError(f"{where}: 'prompt' is a list; chat messages are not read yet, expected a string")
    if not isinstance(prompt, str):
        raise InputError(f"{where}: 'prompt' is {_kind(prompt)}; expected a string")
    if not prompt.strip():
        raise InputError(f"{where}: 'prompt' is empty; expected some text")
    return row


def _is_gsm8k(row: Row) -> bool:
    answer = row.get("answer")
    return "prompt" not in row and "question" in row and isinstance(answer, str) and "####" in answer


def _from_gsm8k(row: Row) -> Row:
    number = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {**row, "prompt": row["question"], "answer": number, "solution": row["answer"]}


def _listed(row: Row) -> str:
    return ", ".join(repr(column) for column in sorted(row)) or "none"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

"""Rows in the Hub's conventions: which columns say what, and what is refused.

A row is a prompt, alone or with a `completion` (demonstrations) or with `chosen` and `rejected` (preferences). Each is
a text, or a list of chat messages `{"role", "content"}`. Also read: `messages`, of which the last is the completion if
it is the assistant's; `chosen` and `rejected` that begin alike, with their prompt; and GSM8K's own format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.types import Row

COMPLETIONS = ("completion", "chosen", "rejected")
_LARGEST = 3.4e38  # in float32
_ROLES = ("system", "developer", "user", "assistant", "tool")
_EXPECTED = (
    "expected 'prompt', 'messages', 'chosen' and 'rejected' that begin alike, or GSM8K's 'question' and 'answer' with "
    "'#### ' before the number; data.columns={prompt: question} reads it from another column"
)


def conventional(value: Any, where: str, columns: Mapping[str, str] | None = None) -> Row:
    """Return a row with a `prompt`, checked.

    Args:
        value: a row as it was found.
        where: it was found, for messages.
        columns: our name of a column -> the one that it has there.

    Raises:
        InputError: it is no row, or has no prompt, or one that cannot be used.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {kind_of(value)}; expected an object with a 'prompt'")
    row = _with_prompt(_renamed(value, where, columns or {}), where)
    if "prompt" not in row:
        raise InputError(f"{where}: no column 'prompt' among {listed(row)}; {_EXPECTED}")
    _check_text(row["prompt"], "prompt", where)
    if isinstance(row["prompt"], list) and (last := row["prompt"][-1]["role"]) == "assistant":
        raise InputError(f"{where}: the last message of 'prompt' has the role {last!r}; expected the user's")
    for column in COMPLETIONS:
        completion = row.get(column)
        if completion is None:
            continue
        if isinstance(completion, list) != isinstance(row["prompt"], list):
            kinds = f"'prompt' is {kind_of(row['prompt'])} and {column!r} is {kind_of(completion)}"
            raise InputError(f"{where}: {kinds}; expected two texts, or two lists of chat messages")
        _check_text(completion, column, where)
        if isinstance(completion, list) and (first := completion[0]["role"]) != "assistant":
            raise InputError(f"{where}: the first message of {column!r} has the role {first!r}; expected 'assistant'")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        check_margin(row.get("margin"), where)
    return row


def check_margin(value: Any, where: str) -> None:
    """Refuse what is neither None nor a number that float32 has; NaN stands for None where a table has no other."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (number and not abs(value) > _LARGEST):
        shown = value if number else kind_of(value)
        raise InputError(f"{where}: 'margin' is {shown}; expected a finite number, or none")


def presented(row: Row, prompt_template: str | None = None, system_prompt: str | None = None) -> Row:
    """The row with its prompt inside `prompt_template`, and as chat messages behind `system_prompt`."""
    prompt = row["prompt"]
    if prompt_template is not None:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        text = prompt_template.replace("{prompt}", text)
        prompt = text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
    row = {**row, "prompt": prompt} if prompt is not row["prompt"] else row
    if system_prompt is None:
        return row
    texts = {name: row[name] for name in ("prompt", *COMPLETIONS) if row.get(name) is not None}
    chat = {name: _messages("user" if name == "prompt" else "assistant", text) for name, text in texts.items()}
    if system_prompt and chat["prompt"][0]["role"] != "system":  # a row's own goes before ours
        chat["prompt"] = [*_messages("system", system_prompt), *chat["prompt"]]
    return {**row, **chat}


def _messages(role: str, text: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def complete_rows(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """The rows that have a completion in each of the columns."""
    return [row for row in rows if all(is_text(row.get(column)) for column in columns)]


def of_one_kind(rows: Sequence[Row], *more: Sequence[Row]) -> list[list[Row]]:
    """The lists of rows with the same columns everywhere, None where a row had none.

    Raises:
        InputError: some prompts are texts and some are chat messages.
    """
    every = [row for part in (rows, *more) for row in part]
    chats = sum(isinstance(row["prompt"], list) for row in every)
    if 0 < chats < len(every):
        raise InputError(
            f"data: the prompts of {chats} of {len(every)} rows are chat messages and the others texts; "
            "make them all of one kind"
        )
    names = dict.fromkeys(name for row in every for name in row)
    absent = dict.fromkeys(names)
    return [[row if len(row) == len(names) else {**absent, **row} for row in part] for part in (rows, *more)]


def check_completions(rows: Sequence[Row], columns: Sequence[str], who: str) -> None:
    """Refuse rows that lack what an algorithm trains on.

    Args:
        rows: of a pass over the data.
        columns: what every row needs, beside its prompt.
        who: needs it.

    Raises:
        InputError: a row has no text there, or an empty one.
    """
    if unfit := [row for row in rows if not all(is_text(row.get(column)) for column in columns)]:
        needed = " and ".join(f"a text {column!r}" for column in columns)
        given = ", ".join(sorted(name for name, value in unfit[0].items() if value is not None))
        raise InputError(f"{who} needs {needed} in every row; {len(unfit)} of {len(rows)} have not, only {given}")
    check_substance(rows, columns, who)


def check_substance(rows: Sequence[Row], columns: Sequence[str], who: str) -> None:
    """Refuse rows with completions of which nothing can be learnt: one that is empty, or pairs that never differ.

    Raises:
        InputError: there are some.
    """
    for column in columns:
        if empty := sum(_is_empty(row[column]) for row in rows):
            raise InputError(f"{who}: {column!r} is empty in {empty} of {len(rows)} rows; leave them out of the data")
    if len(columns) > 1 and rows and all(row[column] == row[columns[0]] for row in rows for column in columns):
        names = " and ".join(map(repr, columns))
        raise InputError(f"{who}: {names} are the same in all of {len(rows)} rows; give pairs that differ")


def is_text(value: Any) -> bool:
    """Whether a cell holds a text or chat messages."""
    return isinstance(value, (str, list))


def listed(row: Row) -> str:
    """The names of a row's columns, for messages."""
    return ", ".join(repr(column) for column in sorted(map(str, row))) or "none"


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a value of the type {type(value).__name__}")


def _renamed(row: Row, where: str, columns: Mapping[str, str]) -> Row:
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise InputError(f"{where}: data.columns reads {ours!r} from {theirs!r}, and the columns are {listed(row)}")
    read = set(columns.values())
    rest = {name: value for name, value in row.items() if name not in read}
    return {**rest, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _with_prompt(row: Row, where: str) -> Row:
    prompt, chosen, rejected, messages = (row.get(name) for name in ("prompt", "chosen", "rejected", "messages"))
    chat_pair = isinstance(chosen, list) and isinstance(rejected, list)
    if (
        (prompt is None or (chat_pair and isinstance(prompt, str)))
        and type(chosen) is type(rejected)
        and is_text(chosen)
    ):
        return {**row, **_split_pair(chosen, rejected, where)}
    if "prompt" in row:
        return row
    if isinstance(messages, list) and messages:
        rest = {name: value for name, value in row.items() if name != "messages"}
        answered = isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
        split = {"prompt": messages[:-1], "completion": messages[-1:]} if answered else {"prompt": messages}
        return {**rest, **split}
    answer = row.get("answer")
    if "question" in row and isinstance(answer, str) and "####" in answer:
        number = answer.rpartition("####")[2].strip().replace(",", "")
        return {**row, "prompt": row["question"], "answer": number, "completion": answer}
    return row


def _split_pair(chosen: Any, rejected: Any, where: str) -> Row:
    """The beginning that both have in common as their prompt: whole messages, or whole words of a text.

    Where a text has no white space in which to part, it is parted where they begin to differ.
    """
    limit = min(len(chosen), len(rejected)) - 1
    same = 0
    while same < limit and chosen[same] == rejected[same]:
        same += 1
    if same <= 0 or chosen == rejected:
        how = "are the same" if chosen == rejected else "have no common beginning, which would be their prompt"
        raise InputError(f"{where}: 'chosen' and 'rejected' {how}; expected a column 'prompt' beside two completions")
    if isinstance(chosen, str):
        words = max((i for i in range(same + 1) if chosen[i : i + 1].isspace() and rejected[i] == chosen[i]), default=0)
        same = words or same
    return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _check_text(value: Any, column: str, where: str) -> None:
    """Refuse what is neither a text nor chat messages, and what is empty."""
    if not is_text(value):
        raise InputError(f"{where}: {column!r} is {kind_of(value)}; expected a text or a list of chat messages")
    if isinstance(value, str):
        _check_characters(value, column, where)
    for message in value if isinstance(value, list) else ():
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(
                f"{where}: {column!r} is a list that holds {_described(message)}; expected chat messages, "
                "{'role': ..., 'content': a text}"
            )
        if message.get("role") not in _ROLES:
            raise InputError(
                f"{where}: a message of {column!r} has the role {message.get('role')!r}; known: {', '.join(_ROLES)}"
            )
        _check_characters(message["content"], column, where)
    if column == "prompt" and _is_empty(value):
        raise InputError(f"{where}: 'prompt' is empty; expected some text")
    if value == []:
        raise InputError(f"{where}: {column!r} has no messages; expected the assistant's")


def _check_characters(text: str, column: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates, as an escape in JSON can make
        raise InputError(
            f"{where}: {column!r} has {text[error.start]!r} at {error.start}, which is no character; leave it out"
        ) from None


def _described(message: Any) -> str:
    if not isinstance(message, dict):
        return kind_of(message)
    if "content" not in message:
        return "a message without 'content'"
    return f"a message whose 'content' is {kind_of(message['content'])}"


def _is_empty(text: Any) -> bool:
    contents = [text] if isinstance(text, str) else [str(message["content"]) for message in text]
    return not any(content.strip() for content in contents)

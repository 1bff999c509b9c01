"""Rewards that check an answer: 1.0 for right, 0.0 for wrong. Only the completion is read, never the prompt."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any, TypeVar

from lit_rlhf.errors import InputError
from lit_rlhf.rewards.functions import verifier
from lit_rlhf.rewards.timeouts import TimedOut, within

T = TypeVar("T")

# A minus is a sign only where nothing stands before it: "10-7" holds 10 and 7, "=-7" holds -7.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)%])[-−])?\$?(?P<inner_sign>(?<=\$)[-−])?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


_SECONDS = 5.0  # for one expression
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # and no command of LaTeX
_LOUD = ("math_verify.parser", "math_verify.grader")  # they warn that the limit on time is ours


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the content of its chat messages.

    >>> text_of([{"role": "assistant", "content": "46"}])
    '46'
    """
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") or "" for message in completion]
    blocks = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "".join(block.get("text", "") for content in blocks for block in content)


@verifier
def exact_match(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the completion is the answer, but for white space around either; `None` without an answer.

    >>> exact_match(completions=[" 46", "47"], answer=["46", "46"])
    [1.0, 0.0]
    """
    pairs = zip(map(text_of, completions), answer, strict=True)
    return [None if right is None else float(text.strip() == str(right).strip()) for text, right in pairs]


@verifier(answer=lambda completion: final_number(completion))
def numeric_answer(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the completion's final number equals the answer, as GSM8K is graded.

    The final number is the first after the last `####`, or the last one where there is no `####`. Thousands
    commas, `$`, `%` and a full stop behind it do not count, nor does the form: 72.0 is 72. `None` where the
    reference answer, or what follows its last `####`, is not one number: 1/2, x = 3 or a date.

    >>> numeric_answer(completions=["so 3*24 = 72.", "#### $1,234.00", "#### 71"], answer=["72", "1234", "72"])
    [1.0, 1.0, 0.0]
    """
    references = [reference_number(str(right)) for right in answer]
    pairs = zip(map(text_of, completions), references, strict=True)
    return [None if right is None else float(final_number(text) == right) for text, right in pairs]


@verifier(answer=lambda completion: _final_expression(completion))
def math_expression(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    r"""Return 1.0 where the completion's final expression equals the answer, as the library math-verify decides.

    `None` where the reference answer is no expression that it reads; 0.0 where the completion holds none, or comparing
    takes longer than five seconds. A bare answer, `x^2 + 1`, is read as if it stood between `$`.

    >>> math_expression(completions=[r"so $x = \frac{2}{4}$", "$0.6$"], answer=["1/2", "1/2"])
    [1.0, 0.0]
    """
    golds: dict[str, list[Any]] = {
        right: _in_time(partial(_gold, right), []) for right in {str(a) for a in answer if a is not None}
    }
    found: list[float | None] = []
    for text, right in zip(map(text_of, completions), answer, strict=True):
        gold = golds.get(str(right), [])
        found.append(float(_in_time(partial(_equal, gold, text), False)) if gold else None)
    return found


def _final_expression(text: str) -> str | None:
    r"""What the text arrives at, in the one way that sympy writes it: 1/2 of `0.5` and of `x = \frac{2}{4}`."""

    def written() -> str | None:
        found = _expressions(text)
        if not found:
            return None
        equation = type(found[0]).__name__ == "Equality" and found[0].lhs.is_Symbol
        return str(found[0].rhs if equation else found[0])

    return _in_time(written, None)


def _gold(right: str) -> list[Any]:
    bare = "$" not in right and "\\boxed" not in right and not _WORD.search(right)
    return (_expressions(f"${right}$") if bare else []) or _expressions(right)


def _equal(gold: list[Any], text: str) -> bool:
    predicted = _expressions(text)
    return bool(predicted) and bool(_math_verify().verify(gold, predicted, timeout_seconds=None))


def _expressions(text: str) -> list[Any]:
    # a limit of its own would need the main thread, and would take away the one that is set around it
    return list(_math_verify().parse(text, parsing_timeout=None))


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError:
        raise InputError(
            "lit_rlhf.rewards.math_expression needs the package math-verify: pip install 'lit_rlhf[math]'"
        ) from None
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    return math_verify


def _in_time(call: Callable[[], T], otherwise: T) -> T:
    try:
        return within(_SECONDS, call)
    except TimedOut:
        return otherwise


def final_number(text: str) -> Decimal | None:
    """Return the number a text arrives at (see `numeric_answer`), or `None`.

    >>> final_number("5 - 3 = 2, so it costs -$1,200.50.")
    Decimal('-1200.50')
    """
    _, marker, conclusion = text.rpartition("####")
    matches = list(_NUMBER.finditer(conclusion))
    if not matches:
        return None
    match = matches[0 if marker else -1]
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] or match["inner_sign"] else value


def reference_number(text: str) -> Decimal | None:
    """Return the number that a reference answer is as a whole (see `numeric_answer`), or `None`.

    >>> reference_number("3 * 24 = 72 #### $72."), reference_number("1/2")
    (Decimal('72'), None)
    """
    whole = text.rpartition("####")[2].strip().removesuffix(".").strip("$ ").rstrip("% ")
    return final_number(whole) if _NUMBER.fullmatch(whole) else None

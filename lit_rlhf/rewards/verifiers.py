"""Rewards that check an answer: 1.0 for right, 0.0 for wrong. Only the completion is read, never the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from lit_rlhf.rewards.functions import verifier

# A minus is a sign only where nothing stands before it: "10-7" holds 10 and 7, "=-7" holds -7.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)%])[-−])?\$?(?P<inner_sign>(?<=\$)[-−])?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


@verifier
def exact_match(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the completion is the answer, but for white space around either; `None` without an answer.

    >>> exact_match(completions=[" 46", "47"], answer=["46", "46"])
    [1.0, 0.0]
    """
    pairs = zip(completions, answer, strict=True)
    return [None if right is None else float(completion.strip() == str(right).strip()) for completion, right in pairs]


@verifier(answer=lambda completion: final_number(completion))
def numeric_answer(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """Return 1.0 where the completion's final number equals the answer, as GSM8K is graded.

    The final number is the first after the last `####`, or the last one where there is no `####`. Thousands
    commas, `$`, `%` and a full stop behind it do not count, nor does the form: 72.0 is 72. `None` where the
    reference answer holds no number.

    >>> numeric_answer(completions=["so 3*24 = 72.", "#### $1,234.00", "#### 71"], answer=["72", "1234", "72"])
    [1.0, 1.0, 0.0]
    """
    references = [final_number(str(right)) for right in answer]
    pairs = zip(completions, references, strict=True)
    return [None if right is None else float(final_number(completion) == right) for completion, right in pairs]


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

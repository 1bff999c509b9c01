"""Addition problems, generated offline: a verifiable task that a tiny model learns in a minute.

`arithmetic_splits` makes the problems, `demonstrations` and `preference_pairs` the answers of a sloppy
tutor, who is right half of the time. A model that imitates the tutor knows the answer and does not know
that it matters: the starting point from which learning from rewards has something to win.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.types import Row

SLOPPY_OFFSETS = (1, 2, 10)
SAMPLED_TRAIN_SIZE = 20_000
MAX_DIGITS = 9


def arithmetic_splits(
    difficulty: int | Sequence[int] = 2,
    held_out: int | Sequence[int] = 512,
    train_size: int | Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[list[Row], list[Row]]:
    """Make training and held-out addition problems, in random order, the same for the same seed.

    A held-out problem never occurs in training, nor does it commuted: a+b and b+a are held out together.

    Args:
        difficulty: most digits of an operand. 1 has 100 problems, 2 has 10,000, 3 a million. A list of levels mixes
            them: the larger operand of a level's problems has exactly as many digits, so that no two share one, and
            each row says its level in a column `difficulty`.
        held_out: number of held-out problems; a tenth of all problems at most, silently (10 at difficulty 1).
        train_size: number of training problems. `None`: all that are left up to difficulty 2, 20,000 beyond.
            Of levels both sizes are those of each; a list gives every level its own.
        seed: decides which problems are held out, and the order of both lists.

    Returns:
        Training rows and held-out rows, each `{"prompt": "12+34=", "answer": "46"}`, of levels with `"difficulty": 2`.

    Raises:
        InputError: for a difficulty outside 1 to 9, a negative size, or more problems than there are.

    >>> train, test = arithmetic_splits(difficulty=1, held_out=512)
    >>> len(train), len(test)
    (90, 10)
    >>> train, test = arithmetic_splits(difficulty=[1, 3], held_out=[0, 7], train_size=50)
    >>> [row["difficulty"] for row in train].count(3), len(test), test[0].keys()
    (50, 7, dict_keys(['prompt', 'answer', 'difficulty']))
    """
    if not _several(difficulty):
        _check_sizes(difficulty, held_out, train_size)
        return _split(difficulty, 0, held_out, train_size, random.Random(seed))  # type: ignore[arg-type]
    levels = list(difficulty)  # type: ignore[arg-type]
    if not levels or len(set(levels)) < len(levels):
        raise InputError(f"arithmetic: difficulty must be levels that differ, such as [1,2,3], got {levels}")
    train: list[Row] = []
    test: list[Row] = []
    sizes = zip(_of_levels("held_out", held_out, levels), _of_levels("train_size", train_size, levels), strict=True)
    for level, (held, size) in zip(levels, sizes, strict=True):
        _check_sizes(level, held, size)
        smallest = 10 ** (level - 1) if level > 1 else 0
        both = _split(level, smallest, held, size, random.Random(f"{seed}/{level}"))
        for rows, new in zip((train, test), both, strict=True):
            rows += [{**row, "difficulty": level} for row in new]
    rng = random.Random(f"{seed}/levels")
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _several(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _of_levels(name: str, size: Any, levels: Sequence[int]) -> list[Any]:
    """A size for each of the levels."""
    if not _several(size):
        return [size] * len(levels)
    if len(size) != len(levels):
        raise InputError(f"arithmetic: {name} must be a number, or one for each of {levels}, got {list(size)}")
    return list(size)


def _split(
    digits: int, smallest: int, held_out: int, train_size: int | None, rng: random.Random
) -> tuple[list[Row], list[Row]]:
    """The problems of two operands of at most `digits` digits, of which one is `smallest` at least."""
    operands = 10**digits
    problems = operands**2 - smallest**2
    held_out = min(held_out, problems // 10)
    if train_size is None:
        train_size = problems - held_out if digits <= 2 else SAMPLED_TRAIN_SIZE
    if train_size > problems - held_out:
        raise InputError(
            f"arithmetic: train_size must be at most {problems - held_out} at difficulty {digits} "
            f"with {held_out} problems held out, got {train_size}"
        )
    # Twice the held-out size to spare: no more than `held_out` of the drawn problems leave the training list.
    drawn = rng.sample(range(problems), min(problems, train_size + 2 * held_out))
    pairs = [_problem(number, smallest, operands) for number in drawn]
    held = _hold_out(pairs, held_out, smallest, operands, rng)
    train = [pair for pair in pairs if pair not in held][:train_size]
    test = list(held)
    rng.shuffle(test)
    return [_row(*pair) for pair in train], [_row(*pair) for pair in test]


def _problem(number: int, smallest: int, operands: int) -> tuple[int, int]:
    """The operands of a problem by its number: those whose first is `smallest` at least, then those whose second is."""
    large = operands - smallest
    if number < large * operands:
        a, b = divmod(number, operands)
        return smallest + a, b
    a, b = divmod(number - large * operands, large)
    return a, smallest + b


def sloppy_answer(answer: str, rng: random.Random) -> str:
    """Return a wrong answer: off by 1, 2 or 10, up or down, never negative."""
    right = int(answer)
    offset = rng.choice(SLOPPY_OFFSETS) * rng.choice((-1, 1))
    return str(right + offset if right + offset >= 0 else right - offset)


def demonstrations(rows: Sequence[Row], seed: int, right_fraction: float = 0.5, epoch: int = 0) -> list[Row]:
    """Add the sloppy tutor's answer to each row as its `completion`.

    The tutor errs anew at every visit: pass the number of the epoch, and a model trained for many epochs
    sees right and wrong answers to the same problem. A tutor whose mistakes are fixed would be memorised.

    Args:
        rows: problems with an `answer`; they are not changed.
        seed: with `epoch`, decides the tutor's mistakes.
        right_fraction: chance that an answer is right.
        epoch: how many times the rows were visited before.

    Raises:
        InputError: for a `right_fraction` outside 0 to 1.
    """
    if not 0 <= right_fraction <= 1:
        raise InputError(f"arithmetic: right_fraction must be in [0, 1], got {right_fraction}")
    rng = _visit_rng(seed, epoch)
    return [
        {**row, "completion": row["answer"] if rng.random() < right_fraction else sloppy_answer(row["answer"], rng)}
        for row in rows
    ]


def preference_pairs(rows: Sequence[Row], seed: int, epoch: int = 0) -> list[Row]:
    """Add to each row the right answer as `chosen` and a sloppy one as `rejected`, drawn anew in each epoch."""
    rng = _visit_rng(seed, epoch)
    return [{**row, "chosen": row["answer"], "rejected": sloppy_answer(row["answer"], rng)} for row in rows]


def _visit_rng(seed: int, epoch: int) -> random.Random:
    return random.Random(f"{seed}/{epoch}")  # a string is hashed whole: (0, 1) and (1, 0) differ


def _row(a: int, b: int) -> Row:
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def _hold_out(
    pairs: Sequence[tuple[int, int]], count: int, smallest: int, operands: int, rng: random.Random
) -> dict[tuple[int, int], None]:
    """Choose exactly `count` problems, closed under commutation, as an ordered set."""
    held: dict[tuple[int, int], None] = {}
    for a, b in pairs:
        if len(held) >= count - 1:
            break
        held[a, b] = held[b, a] = None
    while len(held) < count:  # one place is left, and only a+a fits into it
        a = rng.randrange(smallest, operands)
        held[a, a] = None
    return held


def _check_sizes(difficulty: Any, held_out: Any, train_size: Any) -> None:
    for name, size in (("difficulty", difficulty), ("held_out", held_out), ("train_size", train_size)):
        if not (type(size) is int or (size is None and name == "train_size")):
            raise InputError(f"arithmetic: {name} must be an integer, got {size!r}")
    if not 1 <= difficulty <= MAX_DIGITS:
        raise InputError(f"arithmetic: difficulty must be 1 to {MAX_DIGITS} digits, got {difficulty}")
    for name, size in (("held_out", held_out), ("train_size", train_size)):
        if size is not None and size < 0:
            raise InputError(f"arithmetic: {name} must be 0 or more, got {size}")

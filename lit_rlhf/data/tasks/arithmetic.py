"""Addition problems, generated offline: a verifiable task that a tiny model learns in a minute.

`arithmetic_splits` makes the problems, `demonstrations` and `preference_pairs` the answers of a sloppy
tutor, who is right half of the time. A model that imitates the tutor knows the answer and does not know
that it matters: the starting point from which learning from rewards has something to win.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lit_rlhf.errors import InputError
from lit_rlhf.types import Row

SLOPPY_OFFSETS = (1, 2, 10)
SAMPLED_TRAIN_SIZE = 20_000
MAX_DIGITS = 9


def arithmetic_splits(
    difficulty: int = 2, held_out: int = 512, train_size: int | None = None, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Make training and held-out addition problems, in random order, the same for the same seed.

    A held-out problem never occurs in training, nor does it commuted: a+b and b+a are held out together.

    Args:
        difficulty: most digits of an operand. 1 has 100 problems, 2 has 10,000, 3 a million.
        held_out: number of held-out problems; a tenth of all problems at most, silently (10 at difficulty 1).
        train_size: number of training problems. `None`: all that are left up to difficulty 2, 20,000 beyond.
        seed: decides which problems are held out, and the order of both lists.

    Returns:
        Training rows and held-out rows, each `{"prompt": "12+34=", "answer": "46"}`.

    Raises:
        InputError: for a difficulty outside 1 to 9, a negative size, or more problems than there are.

    >>> train, test = arithmetic_splits(difficulty=1, held_out=512)
    >>> len(train), len(test)
    (90, 10)
    """
    _check_sizes(difficulty, held_out, train_size)
    operands = 10**difficulty
    problems = operands**2
    held_out = min(held_out, problems // 10)
    if train_size is None:
        train_size = problems - held_out if difficulty <= 2 else SAMPLED_TRAIN_SIZE
    if train_size > problems - held_out:
        raise InputError(
            f"arithmetic: train_size must be at most {problems - held_out} at difficulty {difficulty} "
            f"with {held_out} problems held out, got {train_size}"
        )
    rng = random.Random(seed)
    # Twice the held-out size to spare: no more than `held_out` of the drawn problems leave the training list.
    drawn = rng.sample(range(problems), min(problems, train_size + 2 * held_out))
    pairs = [divmod(problem, operands) for problem in drawn]
    held = _hold_out(pairs, held_out, operands, rng)
    train = [pair for pair in pairs if pair not in held][:train_size]
    test = list(held)
    rng.shuffle(test)
    return [_row(*pair) for pair in train], [_row(*pair) for pair in test]


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
    pairs: Sequence[tuple[int, int]], count: int, operands: int, rng: random.Random
) -> dict[tuple[int, int], None]:
    """Choose exactly `count` problems, closed under commutation, as an ordered set."""
    held: dict[tuple[int, int], None] = {}
    for a, b in pairs:
        if len(held) >= count - 1:
            break
        held[a, b] = held[b, a] = None
    while len(held) < count:  # one place is left, and only a+a fits into it
        a = rng.randrange(operands)
        held[a, a] = None
    return held


def _check_sizes(difficulty: int, held_out: int, train_size: int | None) -> None:
    if not 1 <= difficulty <= MAX_DIGITS:
        raise InputError(f"arithmetic: difficulty must be 1 to {MAX_DIGITS} digits, got {difficulty}")
    for name, size in (("held_out", held_out), ("train_size", train_size)):
        if size is not None and size < 0:
            raise InputError(f"arithmetic: {name} must be 0 or more, got {size}")

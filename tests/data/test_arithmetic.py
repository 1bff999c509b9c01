"""The generated problems: nothing leaks, everything repeats, and the tutor is as sloppy as promised."""

import itertools
import random
import re
from collections import Counter

import pytest

from lit_rlhf.data.tasks import arithmetic_splits, demonstrations, preference_pairs, sloppy_answer
from lit_rlhf.errors import InputError


def operands(row):
    a, b = re.fullmatch(r"(\d+)\+(\d+)=", row["prompt"]).groups()
    return int(a), int(b)


@pytest.mark.parametrize(
    ("difficulty", "held_out", "train_size", "sizes"),
    [
        (1, 512, None, (90, 10)),  # a tenth of the hundred problems
        (1, 3, None, (97, 3)),
        (2, 512, None, (9488, 512)),
        (2, 1, None, (9999, 1)),
        (2, 0, None, (10000, 0)),
        (2, 511, 1000, (1000, 511)),
        (2, 5000, None, (9000, 1000)),
        (3, 512, None, (20000, 512)),
        (3, 65, 100, (100, 65)),
        (9, 64, 100, (100, 64)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_have_the_asked_sizes_and_share_no_problem(difficulty, held_out, train_size, sizes, seed):
    train, test = arithmetic_splits(difficulty, held_out, train_size, seed)
    assert (len(train), len(test)) == sizes
    train_pairs, test_pairs = [operands(r) for r in train], [operands(r) for r in test]
    assert len(set(train_pairs)) == len(train)
    assert len(set(test_pairs)) == len(test)
    assert not set(train_pairs) & {p for a, b in test_pairs for p in ((a, b), (b, a))}
    assert {(b, a) for a, b in test_pairs} == set(test_pairs)
    for row in train + test:
        assert row.keys() == {"prompt", "answer"}
        a, b = operands(row)
        assert max(a, b) < 10**difficulty
        assert row["answer"] == str(a + b)


def test_difficulty_two_covers_every_problem():
    train, test = arithmetic_splits()
    assert sorted(map(operands, train + test)) == [(a, b) for a in range(100) for b in range(100)]


def test_difficulty_three_has_three_digits_mostly():
    train, _ = arithmetic_splits(difficulty=3)
    share = sum(min(operands(r)) >= 100 for r in train) / len(train)
    assert share == pytest.approx(0.81, abs=0.02)


def test_splits_repeat_with_the_seed_and_differ_without():
    assert arithmetic_splits(seed=3) == arithmetic_splits(seed=3)
    (train, test), (other_train, other_test) = arithmetic_splits(seed=3), arithmetic_splits(seed=4)
    assert train != other_train
    assert {r["prompt"] for r in test} != {r["prompt"] for r in other_test}


def test_rows_come_in_random_order():
    train, test = arithmetic_splits()
    for rows in (train, test):
        first = [operands(r) for r in rows[:400]]
        assert sum(a for a, _ in first) / len(first) == pytest.approx(49.5, abs=8)
    assert (
        sum(operands(r) == operands(s)[::-1] for r, s in itertools.pairwise(test)) < 10
    )  # a+b and b+a are not side by side


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficulty": 0}, "difficulty must be 1 to 9 digits, got 0"),
        ({"difficulty": 10}, "difficulty must be 1 to 9 digits, got 10"),
        ({"held_out": -1}, "held_out must be 0 or more, got -1"),
        ({"train_size": -5}, "train_size must be 0 or more, got -5"),
        ({"train_size": 9489}, "train_size must be at most 9488 at difficulty 2 with 512 problems held out, got 9489"),
    ],
)
def test_impossible_splits_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        arithmetic_splits(**arguments)


def test_sloppy_answers_are_off_by_1_2_or_10():
    rng = random.Random(0)
    offsets = Counter(int(sloppy_answer("50", rng)) - 50 for _ in range(6000))
    assert offsets.keys() == {-10, -2, -1, 1, 2, 10}
    assert all(count == pytest.approx(1000, abs=150) for count in offsets.values())


@pytest.mark.parametrize(("answer", "possible"), [("0", {1, 2, 10}), ("1", {0, 2, 3, 11}), ("9", {8, 10, 7, 11, 19})])
def test_sloppy_answers_are_never_negative(answer, possible):
    rng = random.Random(0)
    assert {int(sloppy_answer(answer, rng)) for _ in range(500)} == possible


def test_the_tutor_is_right_half_of_the_time():
    rows, _ = arithmetic_splits()
    shown = demonstrations(rows, seed=0)
    assert [{k: r[k] for k in ("prompt", "answer")} for r in shown] == rows
    errors = [int(r["completion"]) - int(r["answer"]) for r in shown]
    assert errors.count(0) / len(errors) == pytest.approx(0.5, abs=0.02)
    assert {abs(e) for e in errors} == {0, 1, 2, 10}


@pytest.mark.parametrize("fraction", [0.0, 0.9, 1.0])
def test_the_tutor_is_right_as_often_as_asked(fraction):
    rows, _ = arithmetic_splits()
    shown = demonstrations(rows, seed=0, right_fraction=fraction)
    assert sum(r["completion"] == r["answer"] for r in shown) / len(shown) == pytest.approx(fraction, abs=0.02)


def test_the_tutor_repeats_itself_within_an_epoch_and_errs_anew_in_the_next():
    rows, _ = arithmetic_splits()
    first, again, second, other = (
        [r["completion"] for r in demonstrations(rows, seed=seed, epoch=epoch)]
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    right = [[c == r["answer"] for c, r in zip(run, rows, strict=True)] for run in (first, second, other)]
    for x, y in ((0, 1), (0, 2), (1, 2)):  # independent coins agree half of the time
        agreement = sum(a == b for a, b in zip(right[x], right[y], strict=True)) / len(rows)
        assert agreement == pytest.approx(0.5, abs=0.02)


def test_the_tutor_refuses_an_impossible_fraction():
    with pytest.raises(InputError, match=r"right_fraction must be in \[0, 1\], got 1.5"):
        demonstrations([], seed=0, right_fraction=1.5)


def test_preference_pairs_prefer_the_right_answer():
    rows, _ = arithmetic_splits()
    pairs = preference_pairs(rows, seed=0)
    assert all(p["chosen"] == p["answer"] == str(sum(operands(p))) for p in pairs)
    assert {abs(int(p["rejected"]) - int(p["answer"])) for p in pairs} == {1, 2, 10}
    assert pairs == preference_pairs(rows, seed=0)
    assert pairs != preference_pairs(rows, seed=0, epoch=1)
    assert all(row.keys() == {"prompt", "answer"} for row in rows)

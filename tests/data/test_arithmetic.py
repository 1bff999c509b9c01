"""The generated problems: nothing leaks, everything repeats, and the tutor is as sloppy as promised."""

import hashlib
import itertools
import json
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


# several levels


def digits_of(row):
    return max(len(str(operand)) for operand in operands(row))


@pytest.mark.parametrize(
    ("levels", "held_out", "train_size", "sizes"),
    [
        ([1], 512, None, {1: (90, 10)}),
        ([2], 512, None, {2: (9388, 512)}),  # 9,900 problems have an operand of two digits
        ([1, 2, 3], 100, None, {1: (90, 10), 2: (9800, 100), 3: (20000, 100)}),
        ([3, 1], 7, 40, {3: (40, 7), 1: (40, 7)}),
        ([1, 2, 4], [0, 65, 1], [100, 9835, 10], {1: (100, 0), 2: (9835, 65), 4: (10, 1)}),
        ((2, 9), 64, [100, 0], {2: (100, 64), 9: (0, 64)}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_levels_have_the_asked_sizes_and_share_no_problem(levels, held_out, train_size, sizes, seed):
    train, test = arithmetic_splits(levels, held_out, train_size, seed)
    for row in train + test:
        assert row.keys() == {"prompt", "answer", "difficulty"}
        assert row["difficulty"] == digits_of(row)
        assert row["answer"] == str(sum(operands(row)))
    found = [Counter(row["difficulty"] for row in rows) for rows in (train, test)]
    assert {level: (found[0][level], found[1][level]) for level in levels} == sizes
    train_pairs, test_pairs = [operands(r) for r in train], [operands(r) for r in test]
    assert len(set(train_pairs)) == len(train)
    assert len(set(test_pairs)) == len(test)
    assert not set(train_pairs) & {p for a, b in test_pairs for p in ((a, b), (b, a))}
    assert {(b, a) for a, b in test_pairs} == set(test_pairs)


def test_a_level_is_every_problem_with_as_many_digits():
    train, test = arithmetic_splits([1, 2])
    assert sorted(map(operands, train + test)) == [(a, b) for a in range(100) for b in range(100)]
    train, test = arithmetic_splits([3], held_out=0, train_size=99_000)
    below = [sum(min(operands(r)) < limit for r in train) / len(train) for limit in (10, 100)]
    # of the 999,000 problems 2 * 10 * 900 have an operand below 10 and 2 * 100 * 900 one below 100
    assert below == pytest.approx([0.018, 0.18], rel=0.06)
    assert sum(operands(r)[0] < operands(r)[1] for r in train) / len(train) == pytest.approx(0.5, abs=0.01)


def test_levels_are_mixed_and_repeat_with_the_seed():
    train, _ = arithmetic_splits([2, 3], train_size=1000)
    assert Counter(row["difficulty"] for row in train[:400])[2] == pytest.approx(200, abs=50)
    assert arithmetic_splits([2, 3], seed=3) == arithmetic_splits([2, 3], seed=3)
    assert arithmetic_splits([2, 3], seed=3) != arithmetic_splits([2, 3], seed=4)
    of_two = [[row for row in arithmetic_splits(levels)[0] if row["difficulty"] == 2] for levels in ([2, 3], [1, 2])]
    assert {r["prompt"] for r in of_two[0]} == {r["prompt"] for r in of_two[1]}, "a level does not depend on the others"


def test_one_number_gives_the_problems_that_the_recorded_results_were_made_with():
    """The digest was taken before there were levels."""
    digests = {
        arguments: hashlib.sha256(json.dumps(arithmetic_splits(*arguments)).encode()).hexdigest()[:16]
        for arguments in ((1, 512, None, 0), (2, 512, None, 0), (2, 511, 1000, 1), (3, 512, None, 0), (9, 64, 100, 0))
    }
    assert list(digests.values()) == [
        "c79b00e8826c12bc",
        "47233b0f876b739c",
        "bf78a8f7496e4933",
        "4834b3ac5e194483",
        "f89f3a027a2817c9",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficulty": []}, r"difficulty must be levels that differ, such as \[1,2,3\], got \[\]"),
        ({"difficulty": [2, 2]}, r"difficulty must be levels that differ, such as \[1,2,3\], got \[2, 2\]"),
        ({"difficulty": [1, 10]}, "difficulty must be 1 to 9 digits, got 10"),
        ({"difficulty": [1, "two"]}, "difficulty must be an integer, got 'two'"),
        ({"difficulty": "2"}, "difficulty must be an integer, got '2'"),
        ({"difficulty": True}, "difficulty must be an integer, got True"),
        ({"difficulty": 2, "train_size": [5]}, r"train_size must be an integer, got \[5\]"),
        ({"difficulty": [1, 2], "held_out": [5]}, r"held_out must be a number, or one for each of \[1, 2\], got \[5\]"),
        ({"difficulty": [1, 2], "held_out": [5, -1]}, "held_out must be 0 or more, got -1"),
        ({"difficulty": [1, 2], "train_size": 91}, "train_size must be at most 90 at difficulty 1"),
    ],
)
def test_impossible_levels_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        arithmetic_splits(**arguments)

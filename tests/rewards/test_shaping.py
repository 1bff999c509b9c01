"""Rewards for the form of a completion, against numbers worked by hand."""

import math
import pickle

import pytest
import torch

from lit_rlhf.errors import InputError
from lit_rlhf.rewards import (
    RewardFunctions,
    cosine_length,
    exact_match,
    overlong,
    regex_format,
    repetition_penalty,
    verifier,
)


def score(fn, texts=("a", "b"), ids=((1,), (2,)), **columns):
    total, _ = RewardFunctions(fn)(["p"] * len(texts), list(texts), [list(row) for row in ids], columns)
    return total.tolist()


def test_a_format_is_that_of_the_whole_completion():
    reward = regex_format(r"<think>.+</think>\s*\d+")
    texts = [
        "<think>a\nb</think>\n42",
        "  <think>a</think>42\n",
        "so <think>a</think>42",
        "<think>a</think>42 or 43",
        "",
    ]
    assert score(reward, texts, [[1]] * 5) == [1, 1, 0, 0, 0]
    chat = RewardFunctions(reward)([[{"role": "user", "content": "p"}]], ["<think>a</think>1"], [[1]], {})
    assert chat[0].tolist() == [1]


@pytest.mark.parametrize(
    ("ids", "size", "expected"),
    [
        ([1, 2, 3, 4], 2, 0),
        ([5, 5, 5, 5, 5], 2, -0.75),  # four pairs, one kind
        ([1, 2, 1, 2, 1], 2, -0.5),  # 12 21 12 21
        ([1, 2, 3, 1, 2, 3], 3, -0.25),  # 123 231 312 123
        ([7, 7, 7], 3, 0),
        ([7, 7], 3, 0),
        ([], 1, 0),
        ([7, 7], 1, -0.5),
    ],
)
def test_repeated_ngrams(ids, size, expected):
    assert score(repetition_penalty(size), ["x"], [ids]) == [expected]
    assert score(repetition_penalty(size, max_penalty=-0.2), ["x"], [ids]) == pytest.approx([0.2 * expected])


def test_the_overlong_penalty_is_dapos():
    """Equation 13 of arXiv 2503.14476 with L_max = 10 and L_cache = 4."""
    ids = [[1] * n for n in (0, 6, 7, 9, 10, 11)]
    assert score(overlong(10, 4), ["x"] * 6, ids) == [0, 0, -0.25, -0.75, -1, -1]
    assert score(overlong(10, 0), ["x"] * 6, ids) == [0, 0, 0, 0, 0, -1]


def test_the_cosine_of_the_length():
    """Of length L/3 the cosine is 1/2, of 2L/3 it is -1/2."""
    reward = cosine_length(exact_match, max_length=6, correct=(3, 1), wrong=(-8, -4), exceeded=-9)
    ids = [[1] * n for n in (0, 2, 4, 6, 0, 2, 4, 7)]
    found = score(reward, ["7"] * 4 + ["8"] * 4, ids, answer=["7"] * 8)
    assert found == pytest.approx([3, 2.5, 1.5, -9, -8, -7, -5, -9])


def test_the_cosine_defaults_are_the_papers():
    ids = [[1] * n for n in (0, 99, 0, 99, 100)]
    found = score(cosine_length("lit_rlhf.rewards.exact_match", 100), list("77888"), ids, answer=["7"] * 5)
    assert found == pytest.approx([2, 1, -10, 0, -10], abs=0.01)


def test_the_cosine_does_not_apply_where_its_verifier_does_not_and_needs_what_it_needs():
    @verifier
    def graded(completions, key, bonus=1):
        return [None if k is None else float(c == k) for c, k in zip(completions, key, strict=True)]

    rewards = RewardFunctions(cosine_length(graded, 10))
    assert rewards.names == ["cosine_length"]
    total, _ = rewards(["p", "p"], ["a", "a"], [[], []], {"key": ["a", None]})
    torch.testing.assert_close(total, torch.tensor([2.0, math.nan]), equal_nan=True)
    with pytest.raises(InputError, match="reward function cosine_length needs 'key', which the data does not have"):
        rewards.check([{"prompt": "p", "answer": "a"}])
    assert rewards.accuracy(torch.ones(1, 1)) is None, "its rewards are no accuracy"


@pytest.mark.parametrize(
    "fn", [regex_format("a+"), repetition_penalty(), overlong(4, 2), cosine_length(exact_match, 4)], ids=range(4)
)
def test_they_survive_a_pickle(fn):
    """Spawned processes are sent them."""
    columns, ids = {"answer": ["aa", "b"]}, [[1, 1], [1, 2, 3]]
    expected = score(fn, ["aa", "b"], ids, **columns)
    assert score(pickle.loads(pickle.dumps(fn)), ["aa", "b"], ids, **columns) == expected


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: regex_format("(a"), r"regex_format: '\(a' is no regular expression, missing \)"),
        (lambda: regex_format(3), "regex_format: 3 is no regular expression"),
        (lambda: repetition_penalty(0), "repetition_penalty: ngram_size must be at least 1, got 0"),
        (lambda: repetition_penalty(2, 1.0), r"repetition_penalty: max_penalty must be at most 0, got 1\.0"),
        (lambda: overlong(4, 5), "overlong: buffer must be from 0 to max_length=4, got 5"),
        (lambda: overlong(4, -1), "overlong: buffer must be from 0 to max_length=4, got -1"),
        (lambda: cosine_length(exact_match, 0), "cosine_length: max_length must be at least 1, got 0"),
        (lambda: cosine_length(exact_match, 4, wrong=(1, 2, 3)), "cosine_length: wrong must be two numbers"),
        (lambda: cosine_length("lit_rlhf.rewards.exact", 4), "has no function 'exact'; the nearest is 'exact_match'"),
    ],
)
def test_arguments_without_a_meaning_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()

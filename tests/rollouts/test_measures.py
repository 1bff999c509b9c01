"""What is measured of judged completions."""

import math

import pytest
import torch

from lit_rlhf.rewards import Judges, RewardFunctions, exact_match
from lit_rlhf.rollouts.measures import majorities, measures, passes
from tests.algorithms.toys import rollout_of

NAN = math.nan


def test_a_prompt_with_fewer_verdicts_than_k_has_no_pass_at_k():
    verdicts = torch.tensor([[1.0, 0, 0, 0], [NAN, 1, 0, NAN], [NAN] * 4, [0, 0, 0, 0]])
    assert passes(verdicts, 2).tolist() == pytest.approx([0.5, 1.0, NAN, 0.0], nan_ok=True)
    assert passes(verdicts, 4).tolist() == pytest.approx([1.0, NAN, NAN, 0.0], nan_ok=True)


def test_answers_vote_and_what_has_no_verdict_does_not():
    verdicts = torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0], [NAN, NAN, 1, 0], [0, 0, 0, 1], [NAN] * 4])
    answers = ["abca", "abbc", "bbac", [None, None, None, "a"], "abcd"]
    assert majorities(verdicts, answers, 4).tolist() == pytest.approx([1, 0, NAN, 1, NAN], nan_ok=True)
    # 2 of "ab" and "ac" of a a b c: 1 of 6 pairs is "aa", 4 are "a" and another, 1 has none
    assert majorities(verdicts, answers, 2).tolist() == pytest.approx([3 / 6, 1 / 4, 1 / 2, 1 / 2, NAN], nan_ok=True)


def test_the_names_and_what_they_are_of():
    def short(completions, **kwargs):
        return [-float(len(c)) for c in completions]

    judges = Judges(RewardFunctions([short]), [exact_match])
    texts, answers = ["2", "2", "33", "9"], ["2", "2", "4", "9"]
    total, parts = judges(["?"] * 4, texts, [[1]] * 4, {"answer": answers})
    rollout = rollout_of(total.tolist(), [1, 1, 2, 1], reward_parts=parts, truncated=[False, False, True, False])
    found = {name: x.tolist() for name, x in measures(rollout, judges, texts, 2, [1, 2]).items()}
    assert found == {
        "accuracy": [1, 1, 0, 1],
        "pass_at_1": [1, 0.5],
        "pass_at_2": [1, 1],
        "maj_at_2": [1, 0.5],
        "reward": [-1, -1, -2, -1],
        "rewards/short": [-1, -1, -2, -1],
        "rewards/exact_match": [1, 1, 0, 1],
        "response_length": [1, 1, 2, 1],
        "truncated_fraction": [0, 0, 1, 0],
    }
    judges = Judges(RewardFunctions([short]))
    assert "accuracy" not in measures(rollout, judges, texts, 2, [2])
    assert "pass_at_2" not in measures(rollout, judges, texts, 2, [2])

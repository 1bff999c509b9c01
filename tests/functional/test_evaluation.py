"""pass@k and maj@k against every subset of the samples, intervals against textbooks and by how often they are right."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from lit_rlhf.functional import majority_at_k, mean_interval, pass_at_k, rate_interval
from lit_rlhf.functional.evaluation import _ways_to_lose, student_t

Z = 1.959963984540054


def passes(n, c, k):
    return float(pass_at_k(torch.tensor([n]), torch.tensor([c]), k))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert passes(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14), (n, c, k)


@pytest.mark.parametrize(("n", "c", "k"), [(200, 1, 100), (200, 13, 10), (1000, 3, 500), (10_000, 2, 7), (8, 8, 8)])
def test_pass_at_k_is_the_closed_form_where_the_binomials_are_large(n, c, k):
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert passes(n, c, k) == pytest.approx(float(exact), rel=1e-12)


def test_pass_at_k_of_prompts_with_different_numbers_of_samples():
    n, c = torch.tensor([4, 6, 9]), torch.tensor([1, 0, 7])
    assert pass_at_k(n, c, 3).tolist() == pytest.approx(
        [passes(*pair, 3) for pair in zip(n.tolist(), c.tolist(), strict=True)]
    )
    assert pass_at_k(n, c, 1).tolist() == pytest.approx((c / n).tolist())


@pytest.mark.parametrize(
    ("n", "c", "k", "said"),
    [
        (4, 2, 5, "from 1 to the 4 samples of a prompt, got 5"),
        (4, 2, 0, "got 0"),
        (4, 5, 2, "correct must be"),
        (4, -1, 2, "correct must be"),
    ],
)
def test_counts_that_cannot_be_are_refused(n, c, k, said):
    with pytest.raises(ValueError, match=said):
        passes(n, c, k)


def vote(answers, right):
    """The chance that the plurality is right, by hand."""
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [a for a, count in votes.items() if count == most]
    return sum(right[a] for a in tied) / len(tied)


def by_subsets(answers, right, k):
    subsets = list(itertools.combinations(answers, k))
    return sum(vote(subset, right) for subset in subsets) / len(subsets)


def majority(answers, right, k):
    votes = Counter(answers)
    abstained = votes.pop(None, 0)
    return majority_at_k(list(votes.values()), [right[a] for a in votes], k, abstained)


def test_maj_at_k_is_the_mean_over_every_subset():
    rng = random.Random(0)
    found = set()
    for _ in range(120):
        n = rng.randint(1, 9)
        answers = [rng.choice(["a", "b", "c", "d", None][: rng.randint(1, 5)]) for _ in range(n)]
        right = {"a": rng.choice([0, 1]), "b": rng.choice([0, 1]), "c": rng.choice([0, 0.25]), "d": 0}
        for k in range(1, n + 1):
            expected = by_subsets(answers, right, k)
            assert majority(answers, right, k) == pytest.approx(expected, abs=1e-12), (answers, right, k)
            found.add(round(expected, 3))
    assert len(found) > 50


def test_maj_at_k_of_many_samples():
    assert majority_at_k([40, 30, 30], [1, 0, 0], 100) == 1
    assert majority_at_k([30, 40, 30], [1, 0, 0], 100) == 0
    assert 0.6 < majority_at_k([40, 30, 30], [1, 0, 0], 25) < majority_at_k([40, 30, 30], [1, 0, 0], 75) < 1
    assert majority_at_k([3], [1], 2, abstained=5) == pytest.approx(1 - math.comb(5, 2) / math.comb(8, 2))
    with pytest.raises(ValueError, match="from 1 to the 3 samples of the prompt, got 4"):
        majority_at_k([2], [1], 4, abstained=1)


def test_no_more_answers_tie_than_the_samples_suffice_for():
    """Counting ties that cannot be makes maj@128 of 256 different answers take seconds."""
    ways = _ways_to_lose([1] * 40, 3, 1, 6)
    assert ways == [math.comb(40, t) * math.comb(3, 6 - t) for t in range(7)]
    assert len(_ways_to_lose([5] * 40, 0, 4, 11)) == 3


# intervals


T = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 4: 2.7764451, 6: 2.4469119, 9: 2.2621572, 19: 2.0930241, 99: 1.9842170}


def t_of(prompts):
    return float(student_t(torch.tensor(prompts - 1)))


def test_students_quantiles_are_those_of_the_tables():
    for degrees, expected in T.items():
        assert t_of(degrees + 1) == pytest.approx(expected, rel=1.3e-3 if degrees == 3 else 4e-4), degrees
    assert float(student_t(torch.tensor(9), 0.8)) == pytest.approx(1.3830287, rel=1e-4)
    assert student_t(torch.tensor([0, 10**9])).tolist() == pytest.approx([math.inf, Z])


def test_one_sample_per_prompt_has_wilsons_interval():
    for right, n in ((1, 7), (3, 7), (40, 100), (497, 512)):
        p, t = right / n, t_of(n)
        centre, reach = p + t**2 / (2 * n), t * math.sqrt(p * (1 - p) / n + t**2 / (4 * n**2))
        low, high = ((centre + sign * reach) / (1 + t**2 / n) for sign in (-1, 1))
        assert rate_interval([1.0] * right + [0.0] * (n - right)) == pytest.approx((p, low, high), abs=1e-12)


def test_samples_are_worth_no_more_than_as_many_trials():
    """The prompts' rates are by chance closer together than those of independent trials: 24 of them, not 214."""
    p, m, t = 13 / 24, 24, t_of(3)
    centre, reach = p + t**2 / (2 * m), t * math.sqrt(p * (1 - p) / m + t**2 / (4 * m**2))
    low, high = ((centre + sign * reach) / (1 + t**2 / m) for sign in (-1, 1))
    assert rate_interval([4, 4, 5], [8] * 3) == pytest.approx((p, low, high), abs=1e-12)


def test_copies_of_a_sample_are_worth_nothing():
    verdicts = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert rate_interval([8 * x for x in verdicts], [8] * 6) == pytest.approx(rate_interval(verdicts), abs=1e-12)
    assert rate_interval([8.0] * 6, [8] * 6) == pytest.approx(rate_interval([1.0] * 6), abs=1e-12)


def test_the_mean_has_the_error_of_the_prompts_means():
    x = [1.0, 4.0, 2.0, 7.0, 3.0]
    reach = t_of(5) * np.std(x, ddof=1) / math.sqrt(5)
    assert mean_interval(x) == pytest.approx((3.4, 3.4 - reach, 3.4 + reach), abs=1e-12)
    assert mean_interval([6 * v for v in x], [6] * 5) == pytest.approx(mean_interval(x), abs=1e-12)
    assert mean_interval(x).half_width == pytest.approx(reach)


def test_prompts_of_different_sizes_weigh_by_their_samples():
    found = mean_interval([3.0, 10.0, 0.0], [1, 4, 0])
    residuals = np.array([3 - 2.6 * 1, 10 - 2.6 * 4])
    reach = t_of(2) * math.sqrt(2 * (residuals**2).sum()) / 5
    assert found == pytest.approx((2.6, 2.6 - reach, 2.6 + reach), abs=1e-12)


def test_where_there_is_nothing_to_tell_from():
    assert all(map(math.isnan, [*rate_interval([]), *mean_interval([], [])]))
    assert mean_interval([2.0]).value == 2
    assert math.isnan(mean_interval([2.0]).low)
    assert rate_interval([3.0], [4]) == (0.75, 0, 1)  # of one prompt nothing is known of the others
    for right in (6, 9, 30):  # by chance all prompts are alike, of 9/30 but for rounding
        found = rate_interval([3 * (right / 30)] * 30, [3] * 30)
        assert found == pytest.approx(rate_interval([1.0] * right + [0.0] * (30 - right)))


@pytest.mark.parametrize(
    ("prompts", "samples", "spread"),
    [(5, 8, 1.0), (10, 8, 1.0), (20, 8, 1.0), (60, 1, 1.0), (60, 8, 0.5), (60, 8, 4.0), (200, 4, 0.2)],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(prompts, samples, spread):
    """Prompts differ in difficulty, Beta(a, a/2) with a = spread; the mean difficulty is 2/3."""
    rng = np.random.default_rng(0)
    runs, hits, naive = 2000, 0, 0
    for _ in range(runs):
        chance = rng.beta(spread, spread / 2, prompts)
        right = rng.binomial(samples, chance)
        _, low, high = rate_interval(right.tolist(), [samples] * prompts)
        hits += low <= 2 / 3 <= high
        p = right.mean() / samples
        naive += abs(p - 2 / 3) <= Z * math.sqrt(p * (1 - p) / (prompts * samples))
    assert 0.935 <= hits / runs <= (0.97 if prompts > 20 else 0.99)
    assert samples == 1 or naive / runs < 0.9, "samples of a prompt are no independent trials"

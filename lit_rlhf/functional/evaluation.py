"""Estimates from n samples of each of B prompts: pass@k, maj@k, and intervals that know what was drawn at random.

The prompts are the sample, and the completions of one prompt are its cluster: they are alike, so that B prompts with n
completions each are worth less than B * n prompts. All intervals here are by prompt (Miller, "Adding Error Bars to
Evals", arXiv 2411.00640, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, inf, pi, sqrt, tan
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def pass_at_k(samples: Int[Tensor, " B"], correct: Int[Tensor, " B"], k: int) -> Float[Tensor, " B"]:
    """Chance that at least one of k samples is right, without bias, of each prompt (Chen et al., arXiv 2107.03374).

        pass@k = 1 − C(n−c, k) / C(n, k) = 1 − Π_{i=n−c+1}^{n} (1 − k/i)

    The product neither overflows nor cancels. Averaged over prompts it is the benchmark's pass@k.

    Args:
        samples: n of each prompt, `[B]`; none may be less than k.
        correct: c, how many of them are right, `[B]`.
        k: at least 1.

    Raises:
        ValueError: k is below 1 or above a prompt's n, or c is not from 0 to n.

    >>> pass_at_k(torch.tensor([8, 8, 8]), torch.tensor([0, 2, 5]), 4)
    tensor([0.0000, 0.7857, 1.0000], dtype=torch.float64)
    """
    if not 1 <= k <= int(samples.min()):
        raise ValueError(f"k must be from 1 to the {int(samples.min())} samples of a prompt, got {k}")
    if bool(((correct < 0) | (correct > samples)).any()):
        raise ValueError("correct must be from 0 to the samples of the prompt")
    i = torch.arange(1, int(samples.max()) + 1, device=samples.device)
    inside = (i > (samples - correct).unsqueeze(1)) & (i <= samples.unsqueeze(1))
    factors: Tensor = torch.where(inside, 1 - k / i.double(), 1.0)
    return 1 - factors.prod(1)


def majority_at_k(votes: Sequence[int], right: Sequence[float], k: int, abstained: int = 0) -> float:
    """Chance that the plurality of k samples is right: self-consistency, maj@k (Wang et al., arXiv 2203.11171).

    Exact: the mean over all C(n, k) subsets of a prompt's n samples, not an estimate from some of them. Of tied answers
    each wins with the same chance. Samples without an answer have no vote; where all k have none, nothing is right.

        maj@k = Σ_a right_a Σ_j C(v_a, j) Σ_t W(j, t) / (t + 1) / C(n, k)

    where W(j, t) counts the ways to choose the k − j others such that t answers have j votes, too, and none has more.

    Args:
        votes: how many of the samples give each distinct answer.
        right: of each of these answers whether it is right, 1 or 0 (or a share, where the verifier is of two minds).
        k: from 1 to n.
        abstained: samples without an answer; n is their number plus that of all votes.

    Raises:
        ValueError: k is not from 1 to n.

    >>> majority_at_k([3, 2, 2], [1, 0, 0], 7), majority_at_k([2, 2], [1, 0], 4), majority_at_k([3, 1], [0, 1], 1)
    (1.0, 0.5, 0.25)
    """
    total = sum(votes) + abstained
    if not 1 <= k <= total:
        raise ValueError(f"k must be from 1 to the {total} samples of the prompt, got {k}")
    chance = 0.0
    for a, share in enumerate(right):
        if share == 0:
            continue
        others = [count for b, count in enumerate(votes) if b != a]
        for j in range(1, min(votes[a], k) + 1):
            ways = _ways_to_lose(others, abstained, j, k - j)
            chance += share * comb(votes[a], j) * sum(w / (t + 1) for t, w in enumerate(ways)) / comb(total, k)
    return chance


def _ways_to_lose(others: Sequence[int], abstained: int, j: int, chosen: int) -> list[int]:
    """By t: ways to choose `chosen` samples such that t of the other answers have j votes each and none has more."""
    ways = [[comb(abstained, i)] for i in range(chosen + 1)]  # [chosen so far][t], which is at most chosen // j
    for count in others:
        after = [[0] * min(len(ways[0]) + 1, chosen // j + 1) for _ in range(chosen + 1)]
        for before, by_ties in enumerate(ways):
            for votes in range(min(count, j, chosen - before) + 1):
                drawn, tie = comb(count, votes), votes == j
                for t, w in enumerate(by_ties):
                    if w:
                        after[before + votes][t + tie] += w * drawn
        ways = after
    return ways[chosen]


class Interval(NamedTuple):
    """An estimate and the confidence interval about it; NaN at the ends where there is none."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def mean_interval(totals: Sequence[float], counts: Sequence[float] | None = None, level: float = 0.95) -> Interval:
    """A mean over samples, Σ totals / Σ counts, with Student's interval by prompt.

        R = Σx_b / Σm_b;    se² = B/(B−1) · Σ (x_b − R·m_b)² / (Σm_b)²;    R ± t·se,    t of B−1 degrees of freedom

    Args:
        totals: x, the sum over each prompt's samples.
        counts: m, their number, 1 each by default; prompts with none are left out.
        level: the interval's confidence.

    >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0, 6.0])]
    [3.0, -0.433, 6.433]
    """
    value, error, prompts, _ = _clustered(totals, counts)
    reach = float(student_t(torch.tensor(prompts - 1), level)) * error
    return Interval(value, value - reach, value + reach)


def rate_interval(totals: Sequence[float], counts: Sequence[float] | None = None, level: float = 0.95) -> Interval:
    """The same of a share, from 0 to 1: Wilson's interval with the effective number of independent samples.

        m = R(1−R) / se², from the clustered se of `mean_interval`, at most Σm_b
        (R + t²/2m ± t·√(R(1−R)/m + t²/4m²)) / (1 + t²/m),    t of B−1 degrees of freedom

    With one sample per prompt it is Wilson's interval of B independent trials (Wilson 1927), with t in place of z. It
    stays within [0, 1] and is not empty where all prompts are alike, say all right: those count as B trials, however
    many samples each has. Of a single prompt it is all of [0, 1].

    Args:
        totals: x, the sum over each prompt's samples, each from 0 to 1.
        counts: m, their number, 1 each by default; prompts with none are left out.
        level: the interval's confidence.

    >>> [round(x, 3) for x in rate_interval([1.0, 1.0, 0.0, 1.0])]
    [0.75, 0.163, 0.979]
    >>> [round(x, 3) for x in rate_interval([4.0, 4.0, 5.0], [8, 8, 8])]
    [0.542, 0.194, 0.853]
    """
    value, error, prompts, samples = _clustered(totals, counts)
    # B/(B-1) is taken away again: with one sample each what remains is R(1-R)/B, and m is B
    spread = error**2 * (prompts - 1) / max(prompts, 1)
    low, high = wilson(*torch.tensor([value, spread, prompts, samples], dtype=torch.float64), level=level)
    return Interval(value, float(low), float(high))


def wilson(
    rate: Float[Tensor, "*K"],
    variance: Float[Tensor, "*K"],
    prompts: Float[Tensor, "*K"],
    samples: Float[Tensor, "*K"],
    *,
    level: float = 0.95,
) -> tuple[Float[Tensor, "*K"], Float[Tensor, "*K"]]:
    """Both ends of Wilson's interval of shares with another variance than independent trials have.

    Args:
        rate: R.
        variance: of the estimate R.
        prompts: B, what counts as the number of trials where the variance is 0 or NaN.
        samples: Σm, the most that the number of trials can be.
        level: the interval's confidence.
    """
    single = (rate * (1 - rate)).clamp(min=0)
    m = torch.where(variance > 1e-12 * single, torch.minimum(single / variance, samples), prompts)
    shrunk = 1 / (1 + m / student_t(prompts - 1, level).square())  # towards 1/2; 1 where t is infinite
    centre = rate + shrunk * (0.5 - rate)
    reach = (single * shrunk * (1 - shrunk) + (shrunk / 2).square()).sqrt()
    return torch.minimum((centre - reach).clamp(min=0), rate), torch.maximum((centre + reach).clamp(max=1), rate)


def student_t(degrees: Tensor, level: float = 0.95) -> Float[Tensor, "*K"]:
    """How many standard errors Student's interval reaches to both sides; infinite without a degree of freedom.

    Exact for one and two degrees of freedom; from three on the expansion about the normal quantile (Abramowitz and
    Stegun 26.7.5), which is 0.12 % too small for three at a level of 0.95, 0.03 % for four, and less for more.

    Args:
        degrees: of freedom, whole numbers, of any shape.
        level: the interval's confidence.

    >>> student_t(torch.tensor([1, 4, 1000]))
    tensor([12.7062,  2.7756,  1.9623], dtype=torch.float64)
    """
    z, n = NormalDist().inv_cdf(0.5 + level / 2), degrees.double()
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    found = torch.stack([term / n**i for i, term in enumerate(terms)]).sum(0)
    for few, exact in ((2, level * sqrt(2 / (1 - level**2))), (1, tan(pi * level / 2)), (0, inf)):
        found = torch.where(n <= few, exact, found)
    return found


def _clustered(totals: Sequence[float], counts: Sequence[float] | None) -> tuple[float, float, int, float]:
    """R, its standard error by prompt (NaN of fewer than two), and the prompts and samples that count."""
    x = torch.as_tensor(totals, dtype=torch.float64)
    m = torch.ones_like(x) if counts is None else torch.as_tensor(counts, dtype=torch.float64)
    x, m = x[m > 0], m[m > 0]
    prompts, samples = len(x), float(m.sum())
    if not prompts:
        return float("nan"), float("nan"), 0, 0.0
    value = float(x.sum()) / samples
    if prompts == 1:
        return value, float("nan"), 1, samples
    residual = float((x - value * m).square().sum())
    return value, sqrt(residual * prompts / (prompts - 1)) / samples, prompts, samples

"""Rewards as they are trained on: normalised by a running mean and deviation, and clipped."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from lit_rlhf.errors import InputError, check_number
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.ranks import mean_over_ranks, sum_over_ranks
from lit_rlhf.types import ScoredRollout

_SEEN = ("reward_count", "reward_mean", "reward_square")  # of all rewards so far; the last, summed about the mean


class RewardArgs(TypedDict, total=False):
    """The keyword arguments of `RewardScaling`."""

    normalize_rewards: bool
    reward_clip: float | None


class RewardScaling:
    """The arguments that scale what on-policy algorithms train on; what is logged and filtered by stays raw.

    Args:
        normalize_rewards: subtract the mean and divide by the standard deviation of all rewards trained on so far, this
            rollout's included, on all ranks. Before `shape_rewards`, so that penalties keep their meaning.
        reward_clip: c, rewards are clipped to [-c, c], after that; None for no clip.
    """

    def __init__(self, normalize_rewards: bool = False, reward_clip: float | None = None) -> None:
        check_number("algo.reward_clip", 1.0 if reward_clip is None else reward_clip, above=0)
        self.normalizes, self.clip = normalize_rewards, reward_clip

    def __call__(self, rollout: ScoredRollout, numbers: dict[str, float]) -> ScoredRollout:
        """The rollout with scaled `rewards`, and `baseline` on the same scale.

        Args:
            rollout: N rows; those without tokens or without a reward count for nothing.
            numbers: what the run has seen so far, see `LoopState.numbers`; it is brought up to date.
        """
        if not self.normalizes and self.clip is None:
            return rollout
        if rollout.rewards.ndim == 2:
            raise InputError(
                "algo.normalize_rewards and algo.reward_clip scale one reward per completion, and these rewards are "
                "[N, T]; leave them out"
            )
        mean, deviation = 0.0, 1.0
        if self.normalizes:
            mean, deviation = self._seen(rollout, numbers)
        rewards = self._scaled(rollout.rewards, mean, deviation)
        baseline = None if rollout.baseline is None else self._scaled(rollout.baseline, mean, deviation)
        return replace(rollout, rewards=rewards, baseline=baseline)

    def _scaled(self, x: Tensor, mean: float, deviation: float) -> Tensor:
        scaled = (x.double() - mean) / deviation
        return (scaled if self.clip is None else scaled.clamp(-self.clip, self.clip)).to(x.dtype)

    @staticmethod
    def _seen(rollout: ScoredRollout, numbers: dict[str, float]) -> tuple[float, float]:
        """Mean and deviation after these rewards; two sets of moments are joined as Chan et al. (1979) do."""
        x, counts = rollout.rewards.double(), rollout.response_mask.any(1) & ~rollout.rewards.isnan()
        here = float(mean_over_ranks(x, counts))
        own = torch.stack([counts.sum().double(), zero_outside((x - here).square(), counts).sum()])
        count, square = sum_over_ranks(own).tolist()
        before, mean, squares = (numbers.get(name, 0.0) for name in _SEEN)
        total = before + count
        if total > 0:
            squares += square + (here - mean) ** 2 * before * count / total
            mean += (here - mean) * count / total
        numbers |= dict(zip(_SEEN, (total, mean, squares), strict=True))
        variance = squares / (total - 1) if total > 1 else 0.0
        return mean, variance**0.5 or 1.0

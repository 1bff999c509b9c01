"""What the sampled completions are like: their rewards and their lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.metrics.base import Moments, MomentsMetric, _moments_update, maximum, mean, minimum, std


def _reward_update(rewards: Tensor) -> Moments:
    return _moments_update((rewards, ~torch.isnan(rewards)))


def _reward_compute(moments: Moments) -> dict[str, Tensor]:
    return {
        "reward_mean": mean(moments)[0],
        "reward_std": std(moments)[0],
        "reward_max": maximum(moments)[0],
        "reward_min": minimum(moments)[0],
    }


class RewardStatistics(MomentsMetric):
    """Mean, unbiased standard deviation and extremes of the rewards; NaN (not scorable) is not counted.

    >>> metric = RewardStatistics()
    >>> metric.update(torch.tensor([1.0, 0.0, 0.5, float("nan")]))
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'reward_mean': 0.5, 'reward_std': 0.5, 'reward_max': 1.0, 'reward_min': 0.0}
    """

    higher_is_better = True

    def update(self, rewards: Tensor) -> None:
        """Count the rewards `[N]` of a batch."""
        self._add(_reward_update(rewards))

    def compute(self) -> dict[str, Tensor]:
        """`reward_mean`, `reward_std`, `reward_max`, `reward_min`: scalars."""
        return _reward_compute(self.moments)


def _length_update(lengths: Tensor, truncated: Tensor) -> Moments:
    return _moments_update((lengths, None), (truncated, None))


def _length_compute(moments: Moments) -> dict[str, Tensor]:
    lengths, truncated = mean(moments)
    return {
        "response_length_mean": lengths,
        "response_length_max": maximum(moments)[0],
        "truncated_fraction": truncated,
    }


class LengthStatistics(MomentsMetric):
    """Mean and greatest length of the completions, in tokens, and the share cut off by the length limit.

    >>> metric = LengthStatistics()
    >>> metric.update(torch.tensor([3, 8, 1, 8]), torch.tensor([False, True, False, False]))
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'response_length_mean': 5.0, 'response_length_max': 8.0, 'truncated_fraction': 0.25}
    """

    def __init__(self) -> None:
        super().__init__(2)

    def update(self, lengths: Tensor, truncated: Tensor) -> None:
        """Count the completions of a batch: `lengths` `[N]`, `truncated` `[N]` bool."""
        self._add(_length_update(lengths, truncated))

    def compute(self) -> dict[str, Tensor]:
        """`response_length_mean`, `response_length_max` in tokens, `truncated_fraction`: scalars."""
        return _length_compute(self.moments)

"""How rewards, a reward model's or DPO's implicit ones, rank pairs of completions; one number per pair."""

from __future__ import annotations

from torch import Tensor

from lit_rlhf.metrics.base import Moments, MomentsMetric, _moments_update, mean, std


def _comparable(chosen: Tensor, rejected: Tensor) -> Tensor:
    if chosen.shape != rejected.shape:
        raise ValueError(f"rejected must have the shape of chosen {tuple(chosen.shape)}, got {tuple(rejected.shape)}")
    return ~(chosen.isnan() | rejected.isnan())


def _preference_accuracy_update(chosen: Tensor, rejected: Tensor) -> Moments:
    comparable = _comparable(chosen, rejected)
    return _moments_update((chosen > rejected, comparable))


def _mean_compute(moments: Moments) -> Tensor:
    return mean(moments)[0]


class PreferenceAccuracy(MomentsMetric):
    """Share of the pairs whose chosen completion has the higher reward; equal rewards count as wrong.

    Pairs of which a reward is NaN are left out.

    >>> import torch
    >>> metric = PreferenceAccuracy()
    >>> metric.update(torch.tensor([1.0, 0.5, 2.0, 3.0]), torch.tensor([0.0, 0.5, 3.0, 1.0]))
    >>> metric.compute().item()
    0.5
    """

    higher_is_better = True

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Count the pairs of a batch: rewards of the chosen and of the rejected completions, both `[N]`.

        Raises:
            ValueError: rewards of different shapes.
        """
        self._add(_preference_accuracy_update(chosen, rejected))

    def compute(self) -> Tensor:
        """Share over all pairs, a scalar from 0 to 1."""
        return _mean_compute(self.moments)


def _reward_margin_update(chosen: Tensor, rejected: Tensor) -> Moments:
    comparable = _comparable(chosen, rejected)
    return _moments_update((chosen.double() - rejected.double(), comparable))


def _reward_margin_compute(moments: Moments) -> dict[str, Tensor]:
    return {"reward_margin": mean(moments)[0], "reward_margin_std": std(moments)[0]}


class RewardMargin(MomentsMetric):
    """By how much the chosen completion's reward exceeds the rejected one's: mean and standard deviation.

    Pairs of which a reward is NaN are left out.

    >>> import torch
    >>> metric = RewardMargin()
    >>> metric.update(torch.tensor([1.0, 0.5, 2.0, float("nan")]), torch.tensor([0.0, 0.5, 3.0, 1.0]))
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'reward_margin': 0.0, 'reward_margin_std': 1.0}
    """

    higher_is_better = True

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Count the pairs of a batch: rewards of the chosen and of the rejected completions, both `[N]`.

        Raises:
            ValueError: rewards of different shapes.
        """
        self._add(_reward_margin_update(chosen, rejected))

    def compute(self) -> dict[str, Tensor]:
        """`reward_margin` and `reward_margin_std`: scalars, in the rewards' own unit."""
        return _reward_margin_compute(self.moments)

"""Advantage estimators as metrics: `forward` returns the advantages, the states hold their moments over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.functional import generalized_advantage_estimation, group_normalize
from lit_rlhf.metrics.base import Moments, MomentsMetric, _moments_update, mean, std


def _advantage_compute(moments: Moments) -> dict[str, Tensor]:
    return {"advantage_mean": mean(moments)[0], "advantage_std": std(moments)[0]}


class GeneralizedAdvantageEstimation(MomentsMetric):
    """`functional.generalized_advantage_estimation`, with mean and standard deviation of what it returned so far.

    `forward` returns the advantages `[N, T]`; the last `advantages` and `returns` stay readable as attributes.
    `compute` returns `advantage_mean` and `advantage_std` over all valid tokens of all ranks: what whitening needs.

    Args:
        gamma: γ.
        gae_lambda: λ.
        **kwargs: of `torchmetrics.Metric`.

    >>> gae = GeneralizedAdvantageEstimation(gamma=0.9, gae_lambda=0.8)
    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    >>> gae(rewards, values, torch.ones(1, 3, dtype=torch.bool))
    tensor([[0.2171, 0.2460, 0.3000]])
    >>> gae.returns
    tensor([[0.7171, 0.8460, 1.0000]])
    >>> {name: round(value.item(), 4) for name, value in gae.compute().items()}
    {'advantage_mean': 0.2544, 'advantage_std': 0.0421}
    """

    advantages: Tensor | None = None
    returns: Tensor | None = None

    def __init__(self, gamma: float = 1.0, gae_lambda: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gamma, self.gae_lambda = gamma, gae_lambda

    def update(self, rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None = None) -> None:
        """Estimate and count. `rewards`, `values`, `mask` are `[N, T]`, `bootstrap` is `[N]`."""
        self.advantages, self.returns = generalized_advantage_estimation(
            rewards, values, mask, self.gamma, self.gae_lambda, bootstrap
        )
        self._add(_moments_update((self.advantages, mask)))

    def compute(self) -> dict[str, Tensor]:
        """`advantage_mean` and `advantage_std`: scalars."""
        return _advantage_compute(self.moments)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """`update`, and the advantages `[N, T]` of this batch."""
        self.update(*args, **kwargs)
        return self.advantages


class GroupNormalization(MomentsMetric):
    """`functional.group_normalize`, with mean and standard deviation of what it returned so far.

    `forward` returns the advantages `[N]`; the last ones stay readable as an attribute. A group must lie within one
    call; rows with a NaN reward are not counted.

    Args:
        scale: "std", "none" or "batch".
        eps: ε, added to the standard deviation.
        **kwargs: of `torchmetrics.Metric`.

    >>> normalize = GroupNormalization()
    >>> normalize(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 0]))
    tensor([ 0.8659, -0.8659, -0.8659,  0.8659])
    >>> {name: round(value.item(), 4) for name, value in normalize.compute().items()}
    {'advantage_mean': 0.0, 'advantage_std': 0.9998}
    """

    advantages: Tensor | None = None

    def __init__(self, scale: str = "std", eps: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale, self.eps = scale, eps

    def update(self, rewards: Tensor, group_ids: Tensor) -> None:
        """Normalise and count. `rewards` and `group_ids` are `[N]`."""
        self.advantages = group_normalize(rewards, group_ids, self.scale, self.eps)
        self._add(_moments_update((self.advantages, ~torch.isnan(rewards))))

    def compute(self) -> dict[str, Tensor]:
        """`advantage_mean` and `advantage_std`, over scored rows: scalars."""
        return _advantage_compute(self.moments)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """`update`, and the advantages `[N]` of this batch."""
        self.update(*args, **kwargs)
        return self.advantages

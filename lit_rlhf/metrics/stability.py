"""How far the policy has moved, how often the clip acts, how sure the policy is, and how good the value function is.

All updates take `[N, T]` tensors with the response mask; masked-out cells may hold anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.functional import approx_kl, clip_statistics, kl_estimate
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.functional.policy_losses import policy_ratio
from lit_rlhf.metrics.base import Moments, MomentsMetric, _moments_update, effective_share, maximum, mean, minimum, std


def _approx_kl_update(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, estimator: str) -> Moments:
    return _moments_update((approx_kl(logprobs, old_logprobs, estimator), mask))


def _mean_compute(moments: Moments) -> Tensor:
    return mean(moments)[0]


class ApproxKL(MomentsMetric):
    """Mean of `functional.approx_kl` per token: KL(π_old‖π) in nats, how far the update has moved the policy.

    Args:
        estimator: "k1", "k2" or "k3".
        **kwargs: of `torchmetrics.Metric`.

    >>> metric = ApproxKL()
    >>> metric.update(torch.tensor([[-0.9, -1.1]]), torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2))
    >>> round(metric.compute().item(), 8)
    0.00500417
    """

    higher_is_better = False

    def __init__(self, estimator: str = "k3", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.estimator = estimator

    def update(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> None:
        """Count the tokens of a batch, all `[N, T]`."""
        self._add(_approx_kl_update(logprobs, old_logprobs, mask, self.estimator))

    def compute(self) -> Tensor:
        """Mean over all tokens, a scalar."""
        return _mean_compute(self.moments)


def _kl_divergence_update(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Moments:
    return _moments_update((kl_estimate(logprobs, ref_logprobs, estimator), mask))


class KLDivergence(MomentsMetric):
    """Mean of `functional.kl_estimate` per token: KL(π‖π_ref) in nats, how far the policy is from the reference.

    Args:
        estimator: "k1", "k2" or "k3".
        **kwargs: of `torchmetrics.Metric`.

    >>> metric = KLDivergence()
    >>> metric.update(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.5]]), torch.ones(1, 2))
    >>> round(metric.compute().item(), 6)
    0.127626
    """

    higher_is_better = False

    def __init__(self, estimator: str = "k3", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.estimator = estimator

    def update(self, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> None:
        """Count the tokens of a batch, all `[N, T]`."""
        self._add(_kl_divergence_update(logprobs, ref_logprobs, mask, self.estimator))

    def compute(self) -> Tensor:
        """Mean over all tokens, a scalar."""
        return _mean_compute(self.moments)


_CLIP_NAMES = ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "ratio_out_of_range")


def _clip_fraction_update(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> Moments:
    stats = clip_statistics(policy_ratio(logprobs, old_logprobs), advantages, low, high)
    return _moments_update(*((stats[name], mask) for name in _CLIP_NAMES))


def _clip_fraction_compute(moments: Moments) -> dict[str, Tensor]:
    return dict(zip(_CLIP_NAMES, mean(moments), strict=True))


class ClipFraction(MomentsMetric):
    """Shares of tokens on which the clip acts, by `functional.clip_statistics`.

    Args:
        clip_ratio_low: ε_low.
        clip_ratio_high: ε_high.
        **kwargs: of `torchmetrics.Metric`.

    >>> metric = ClipFraction()
    >>> ratio, advantages = torch.tensor([[0.5, 0.5, 1.5, 1.0]]), torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    >>> metric.update(ratio.log(), torch.zeros(1, 4), advantages, torch.ones(1, 4))
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'clip_fraction': 0.5, 'clip_fraction_low': 0.25, 'clip_fraction_high': 0.25, 'ratio_out_of_range': 0.75}
    """

    higher_is_better = False

    def __init__(self, clip_ratio_low: float = 0.2, clip_ratio_high: float = 0.2, **kwargs: Any) -> None:
        super().__init__(len(_CLIP_NAMES), **kwargs)
        self.clip_ratio_low, self.clip_ratio_high = clip_ratio_low, clip_ratio_high

    def update(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """Count the tokens of a batch, all `[N, T]`."""
        self._add(
            _clip_fraction_update(logprobs, old_logprobs, advantages, mask, self.clip_ratio_low, self.clip_ratio_high)
        )

    def compute(self) -> dict[str, Tensor]:
        """`clip_fraction`, `clip_fraction_low`, `clip_fraction_high`, `ratio_out_of_range`: scalars, 0 to 1."""
        return _clip_fraction_compute(self.moments)


class PolicyEntropy(MomentsMetric):
    """Mean entropy per token in nats, of entropies from `functional.token_entropy`.

    >>> metric = PolicyEntropy()
    >>> metric.update(torch.tensor([[0.8, 0.4, float("nan")]]), torch.tensor([[True, True, False]]))
    >>> round(metric.compute().item(), 4)
    0.6
    """

    def update(self, entropy: Tensor, mask: Tensor) -> None:
        """Count the tokens of a batch, both `[N, T]`."""
        self._add(_moments_update((entropy, mask)))

    def compute(self) -> Tensor:
        """Mean over all tokens, a scalar."""
        return _mean_compute(self.moments)


def _importance_ratio_update(logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Moments:
    return _moments_update((policy_ratio(logprobs.double(), behavior_logprobs.double()), mask))


def _importance_ratio_compute(moments: Moments) -> dict[str, Tensor]:
    return {
        "ratio_mean": mean(moments)[0],
        "ratio_max": maximum(moments)[0],
        "ratio_min": minimum(moments)[0],
        "ess": effective_share(moments)[0],
    }


class ImportanceRatio(MomentsMetric):
    """Raw ratios w = exp(lp − lp_b), before any clip: mean, extremes and effective sample size.

        ESS = (Σw)² / (n·Σw²),   from 1/n (one sample has all the weight) to 1 (on-policy)

    >>> metric = ImportanceRatio()
    >>> metric.update(torch.tensor([[0.2, 1.0, 5.0]]).log(), torch.zeros(1, 3), torch.ones(1, 3))
    >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
    {'ratio_mean': 2.0667, 'ratio_max': 5.0, 'ratio_min': 0.2, 'ess': 0.4921}
    """

    def update(self, logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> None:
        """Count the tokens of a batch, all `[N, T]` (or sequences, all `[N]`)."""
        self._add(_importance_ratio_update(logprobs, behavior_logprobs, mask))

    def compute(self) -> dict[str, Tensor]:
        """`ratio_mean`, `ratio_max`, `ratio_min`, `ess`: scalars."""
        return _importance_ratio_compute(self.moments)


def _explained_variance_update(values: Tensor, returns: Tensor, mask: Tensor) -> Moments:
    y, v = (zero_outside(x.double(), mask) for x in (returns, values))
    return _moments_update((y, mask), (y - v, mask))


def _explained_variance_compute(moments: Moments) -> Tensor:
    total, residual = std(moments).square()
    return torch.where(total > 0, 1 - residual / torch.where(total > 0, total, 1.0), 0.0)


class ExplainedVariance(MomentsMetric):
    """`functional.explained_variance` of the value function over all tokens; 0 where the returns do not vary.

    >>> metric = ExplainedVariance()
    >>> metric.update(torch.tensor([[1.5, 2.0, 3.0, 3.5]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4))
    >>> round(metric.compute().item(), 4)
    0.9
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(2, **kwargs)

    def update(self, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Count the tokens of a batch, all `[N, T]`."""
        self._add(_explained_variance_update(values, returns, mask))

    def compute(self) -> Tensor:
        """1 − Var(returns − values) / Var(returns), a scalar, at most 1."""
        return _explained_variance_compute(self.moments)

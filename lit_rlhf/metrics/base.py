"""What every metric here holds: count, Σx, Σx² and extremes of K quantities, in float64.

Such sums are exact under any split into batches and over ranks, uneven and empty ones too, where means of means
are not. float64, because a variance from raw float32 sums loses its digits to a large mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_rlhf.functional.evaluation import wilson


class Moments(NamedTuple):
    """Sufficient statistics of K quantities, float64."""

    sums: Tensor  # [3, K]: count, Σx, Σx²
    highs: Tensor  # [2, K]: max x, max −x; −inf where nothing was counted


def _moments_update(*cells: tuple[Tensor, Tensor | None]) -> Moments:
    """Statistics of each `(values, mask)`, of any equal shapes; without a mask every value counts.

    Those with the same shape and mask are taken together: there are many of them in a training step, all small.
    """
    alike: dict[tuple[torch.Size, int | None], list[int]] = {}
    for k, (values, mask) in enumerate(cells):
        alike.setdefault((values.shape, None if mask is None else id(mask)), []).append(k)
    found = [_columns([cells[k][0] for k in ks], cells[ks[0]][1]) for ks in alike.values()]
    order = torch.tensor([k for ks in alike.values() for k in ks]).argsort().to(cells[0][0].device)
    return Moments(*(torch.cat(parts, 1).index_select(1, order) for parts in zip(*found, strict=True)))


def _columns(values: list[Tensor], mask: Tensor | None) -> Moments:
    """Statistics of quantities of one shape and mask."""
    x = torch.stack([v.detach().double().flatten() for v in values])
    if mask is not None and mask.shape != values[0].shape:
        raise ValueError(f"mask must have the shape of the values {tuple(values[0].shape)}, got {tuple(mask.shape)}")
    valid = torch.ones_like(x[0], dtype=torch.bool) if mask is None else mask.bool().flatten()
    if not x.numel():
        return Moments(x.new_zeros(3, len(x)), x.new_full((2, len(x)), -torch.inf))
    kept = torch.where(valid, x, 0.0)
    highs = [torch.where(valid, signed, -torch.inf).amax(1) for signed in (x, -x)]
    counts = valid.sum().double().expand(len(x))
    return Moments(torch.stack([counts, kept.sum(1), kept.square().sum(1)]), torch.stack(highs))


def mean(moments: Moments) -> Tensor:
    """Σx / n, `[K]`; 0 where n = 0."""
    count, total, _ = moments.sums
    result: Tensor = total / count.clamp(min=1)
    return result


def std(moments: Moments) -> Tensor:
    """√( (Σx² − (Σx)²/n) / (n − 1) ), `[K]`; 0 for fewer than two values, and exactly 0 where all are equal."""
    count, total, squares = moments.sums
    variance = (squares - total.square() / count.clamp(min=1)) / (count - 1).clamp(min=1)
    differ = moments.highs.sum(0) != 0  # max − min
    return torch.where(differ, variance, 0.0).clamp(min=0).sqrt()


def maximum(moments: Moments) -> Tensor:
    """Greatest value, `[K]`; 0 where nothing was counted."""
    return torch.where(moments.sums[0] > 0, moments.highs[0], 0.0)


def minimum(moments: Moments) -> Tensor:
    """Least value, `[K]`; 0 where nothing was counted."""
    return torch.where(moments.sums[0] > 0, -moments.highs[1], 0.0)


def effective_share(moments: Moments) -> Tensor:
    """Effective sample size of weights, as a share: (Σw)² / (n·Σw²), `[K]`; 0 where Σw² = 0."""
    count, total, squares = moments.sums
    return torch.where(squares > 0, total.square() / torch.where(squares > 0, count * squares, 1.0), 0.0)


def half_width(moments: Moments, samples: int = 1) -> Tensor:
    """Half of the 95 % interval of rates, `[K]`; see `functional.rate_interval`.

    Args:
        moments: of one rate per prompt.
        samples: how many completions each rate is of.
    """
    count, _, _ = moments.sums
    variance = std(moments).square() * (count - 1) / count**2
    low, high = wilson(mean(moments), variance, count, count * samples)
    return (high - low) / 2


class SumsMetric(Metric):
    """A metric whose states are sums in float64, and stay it whatever the module is cast to."""

    is_differentiable = False
    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] | str = "") -> nn.Module:
        """Move with the module, but keep the precision: `.half()` and `.to(torch.bfloat16)` would ruin the sums."""

        def move_only(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(move_only, exclude_state)


class MomentsMetric(SumsMetric):
    """A metric whose states are the moments of K quantities.

    In a `MetricCollection` pass `compute_groups=False`: it merges metrics whose states are equal after the first
    batch, as those of KL and clip fraction are (all 0) on the first on-policy minibatch.

    Args:
        quantities: K.
        **kwargs: of `torchmetrics.Metric`.
    """

    higher_is_better: bool | None = None

    sums: Tensor
    highs: Tensor

    def __init__(self, quantities: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(3, quantities, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("highs", torch.full((2, quantities), -torch.inf, dtype=torch.float64), dist_reduce_fx="max")

    @property
    def moments(self) -> Moments:
        """The statistics so far: of this rank, or of all while synchronised."""
        return Moments(self.sums, self.highs)

    def _add(self, moments: Moments) -> None:
        self.sums = self.sums + moments.sums.to(self.sums.device)
        self.highs = torch.maximum(self.highs, moments.highs.to(self.highs.device))

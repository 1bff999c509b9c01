"""Counts by bins: how a quantity is spread, over all tokens of a rollout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.metrics.base import SumsMetric


class Histogram(SumsMetric):
    """How many values lie in each of so many bins of one width; the outer ones have what lies beyond, too.

    `update` never waits for the device. Counts are float64 sums: exact over batches and ranks, and what is not finite
    counts nowhere.

    Args:
        low: where the first bin begins.
        high: where the last one ends.
        bins: how many.
        **kwargs: of `torchmetrics.Metric`.

    >>> histogram = Histogram(0.0, 2.0, bins=4)
    >>> histogram.update(torch.tensor([[0.6, 1.0, 9.0, 0.0]]), torch.tensor([[True, True, True, False]]))
    >>> counts, edges = histogram.compute()
    >>> counts.tolist(), edges.tolist()
    ([0.0, 1.0, 1.0, 1.0], [0.0, 0.5, 1.0, 1.5, 2.0])
    """

    counts: Tensor

    def __init__(self, low: float, high: float, bins: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (low < high and bins >= 1):
            raise InputError(f"a histogram needs low < high and at least one bin, got {low}, {high} and {bins}")
        self.low, self.high, self.bins = low, high, bins
        self.add_state("counts", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, mask: Tensor) -> None:
        """Count the values under the mask, both of any shape."""
        found = values.detach().double().flatten()
        counts = mask.flatten().bool() & found.isfinite()
        places = (torch.where(counts, found, self.low) - self.low) * (self.bins / (self.high - self.low))
        index = places.floor().clamp(0, self.bins - 1).long()
        self.counts = self.counts.index_add(0, index, counts.double())

    def compute(self) -> tuple[Tensor, Tensor]:
        """The counts `[bins]` and the bins' edges `[bins + 1]`."""
        return self.counts, torch.linspace(self.low, self.high, self.bins + 1, dtype=torch.float64)

"""Stop updating on a rollout once the policy has moved far enough from the one that sampled it."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.errors import check_number
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.ranks import sum_over_ranks


class TargetKL:
    """Whether an optimiser step would be taken too far out: k3 to the old policy above 1.5 times the target.

    The mean is over the tokens of the step's micro-batches on all ranks, so that all decide alike.

    Args:
        target: nats per token; None never stops.
    """

    def __init__(self, target: float | None) -> None:
        check_number("algo.target_kl", 1.0 if target is None else target, above=0)
        self.target = target
        self._moved = torch.zeros(2)  # of the step so far: sum of k3, tokens

    def add(self, k3: Tensor, mask: Tensor) -> None:
        """Count a micro-batch's k3 per token `[N, T]`."""
        if self.target is not None:
            new = torch.stack([zero_outside(k3, mask).sum(), mask.sum().to(k3)])
            self._moved = self._moved.to(new) + new

    def exceeded(self) -> bool:
        """Whether the step counted since the last call is beyond; every rank has to ask."""
        if self.target is None:
            return False
        moved, tokens = sum_over_ranks(self._moved).tolist()
        self._moved = torch.zeros_like(self._moved)
        return bool(moved > 1.5 * self.target * tokens)

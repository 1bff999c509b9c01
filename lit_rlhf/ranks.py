"""Statistics over all ranks: the same numbers on each, however the rows are spread over them; local outside of DDP."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_rlhf.functional.masked import whiten_by, zero_outside


def sum_over_ranks(x: Tensor) -> Tensor:
    """The elementwise sum of every rank's `x`; a copy where there is one rank. Every rank has to call it."""
    total = x.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def most_over_ranks(count: int, device: torch.device | str) -> int:
    """The largest of every rank's counts. Every rank has to call it."""
    most = torch.tensor(count, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def is_first() -> bool:
    """Whether this process is the first of the ranks, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def gather_objects(own: Any) -> list[Any]:
    """Every rank's object, by rank. Every rank has to call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    objects: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, own)
    return objects


def mean_over_ranks(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the true cells of `mask` on all ranks, a float64 scalar; 0 where there is none."""
    kept = zero_outside(x.double(), mask)
    both = sum_over_ranks(torch.stack([kept.sum(), mask.bool().sum().double()]))
    return both[0] / both[1].clamp(min=1)


def moments_over_ranks(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the true cells on all ranks, in two passes, float64 scalars."""
    mean = mean_over_ranks(x, mask)
    squares = zero_outside((zero_outside(x.double(), mask) - mean).square(), mask).sum()
    both = sum_over_ranks(torch.stack([squares, mask.bool().sum().double()]))
    return mean, both[0] / (both[1] - 1).clamp(min=1)


def whiten_over_ranks(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`functional.masked_whiten` by the mean and variance of all ranks."""
    mean, var = moments_over_ranks(x, mask)
    return whiten_by(x, mask, mean.to(x.dtype), var.to(x.dtype), shift_mean)

"""Statistics over the cells where a mask is true. Masked-out cells may hold anything, NaN and Inf included.

The inputs pass through `torch.where` before any arithmetic, because 0 · NaN = NaN: values and gradients stay
finite, and the gradient of a masked-out cell is exactly 0. A mask without a true cell gives 0 and keeps the
graph, so that `backward` still reaches every parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def zero_outside(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Keep `x` where `mask` is true, 0 elsewhere, with a zero gradient there. Shapes must be equal.

    >>> zero_outside(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    if x.shape != mask.shape:
        raise ValueError(f"mask must have the shape of the values {tuple(x.shape)}, got {tuple(mask.shape)}")
    return torch.where(mask.bool(), x, torch.zeros_like(x))


def masked_mean(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Mean over the true cells of `mask`.

        mean = Σ m·x / Σ m        (0 where Σ m = 0)

    Args:
        x: values, any shape.
        mask: the cells that count, same shape.

    >>> masked_mean(torch.tensor([[1.0, 2.0], [6.0, float("nan")]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.)
    """
    return zero_outside(x, mask).sum() / mask.bool().sum().clamp(min=1)


def masked_var(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Unbiased variance over the true cells, in two passes; 0 for fewer than two of them.

        var = Σ m·(x − mean)² / (Σ m − 1)

    >>> masked_var(torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.tensor([True, True, True, False]))
    tensor(1.)
    """
    deviation = zero_outside(zero_outside(x, mask) - masked_mean(x, mask), mask)
    return deviation.square().sum() / (mask.bool().sum() - 1).clamp(min=1)


def masked_whiten(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], shift_mean: bool = True) -> Float[Tensor, "*S"]:
    """Scale the true cells to variance 1 and, unless told otherwise, shift them to mean 0; 0 elsewhere.

        w = (x − mean) / √(var + 1e-8)        (+ mean with `shift_mean=False`, which keeps the level, for rewards)

    `var` is unbiased. As in lm-human-preferences (Ziegler et al., arXiv 1909.08593); torchtune's function of the
    same name adds the mean back in the opposite case.

    Args:
        x: values, any shape.
        mask: the cells that count, same shape.
        shift_mean: whether the result has mean 0 or keeps the mean of `x`.

    >>> masked_whiten(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4, dtype=torch.bool))
    tensor([-1.1619, -0.3873,  0.3873,  1.1619])
    """
    return whiten_by(x, mask, masked_mean(x, mask), masked_var(x, mask), shift_mean)


def whiten_by(
    x: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    mean: Float[Tensor, ""],
    var: Float[Tensor, ""],
    shift_mean: bool = True,
) -> Float[Tensor, "*S"]:
    """`masked_whiten` by a mean and a variance that are known already, those over all ranks for example.

    >>> whiten_by(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), torch.tensor(1.0), torch.tensor(4.0))
    tensor([0., 1.])
    """
    whitened = (zero_outside(x, mask) - mean) * torch.rsqrt(var + 1e-8)
    return zero_outside(whitened if shift_mean else whitened + mean, mask)


def explained_variance(
    values: Float[Tensor, "*S"], returns: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]
) -> Float[Tensor, ""]:
    """How much of the returns' variance the value function explains: 1 is all, 0 is a constant's share.

        EV = 1 − Var(returns − values) / Var(returns)        (0 where the returns do not vary)

    Unbounded below, as in CleanRL. `values` are those the advantages were computed with, at rollout.

    Args:
        values: predictions, any shape.
        returns: targets, same shape.
        mask: the cells that count, same shape.

    >>> y, v = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.5, 2.0, 3.0, 3.5])
    >>> explained_variance(v, y, torch.ones(4, dtype=torch.bool))
    tensor(0.9000)
    """
    total = masked_var(returns, mask)
    low = torch.where(mask.bool(), returns, torch.inf)
    high = torch.where(mask.bool(), returns, -torch.inf)
    varies = (high > low.min()).any() if returns.numel() else mask.any()
    residual = masked_var(zero_outside(returns, mask) - zero_outside(values, mask), mask)
    return torch.where(varies, 1 - residual / torch.where(varies, total, torch.ones_like(total)), 0.0)

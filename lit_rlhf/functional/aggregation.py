"""From a loss per token to a scalar. Which tokens and rows weigh how much is part of an algorithm's definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lit_rlhf.functional.masked import zero_outside

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_UNITS = {
    "token-mean": "tokens",
    "seq-mean-token-mean": "rows",
    "seq-mean-token-sum": "rows",
    "seq-mean-token-sum-norm": "rows",
}


def aggregate(
    per_token: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    mode: str = "token-mean",
    max_length: int | None = None,
    denominator: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """Reduce a per-token loss to a scalar.

        token-mean                Σ_it m·ℓ / M                        M valid tokens: PPO, DAPO (arXiv 2503.14476)
        seq-mean-token-mean       1/R · Σ_i ( Σ_t m·ℓ / |o_i| )       R non-empty rows: GRPO (arXiv 2402.03300)
        seq-mean-token-sum        1/R · Σ_i Σ_t m·ℓ                   exact REINFORCE, RLOO
        seq-mean-token-sum-norm   1/R · Σ_i Σ_t m·ℓ / max_length      Dr. GRPO (arXiv 2503.20783)

    Rows without a valid token add 0 and are not counted. Masked-out cells may hold anything.

    Args:
        per_token: `[N, T]`.
        mask: `[N, T]`, the valid tokens.
        mode: one of the four above.
        max_length: the constant divisor of "seq-mean-token-sum-norm": the longest completion allowed, not the
            width of this tensor, which padding would change.
        denominator: replaces M or R (see `aggregation_unit`) by the count of the whole optimiser step, over its
            micro-batches and ranks; then the parts add up to what one batch would give.

    Raises:
        ValueError: a loss that is not `[N, T]`, an unknown mode, or a missing `max_length`.

    >>> import torch
    >>> loss = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> aggregate(loss, mask), aggregate(loss, mask, "seq-mean-token-mean"), aggregate(loss, mask, "seq-mean-token-sum")
    (tensor(2.5000), tensor(3.), tensor(5.))
    """
    if per_token.ndim != 2:
        raise ValueError(f"per_token must be [N, T], got shape {tuple(per_token.shape)}")
    unit = aggregation_unit(mode)
    lengths = mask.bool().sum(1)
    if denominator is None:
        denominator = (lengths.sum() if unit == "tokens" else (lengths > 0).sum()).clamp(min=1)
    rows = zero_outside(per_token, mask).sum(1)
    if mode == "seq-mean-token-mean":
        rows = rows / lengths.clamp(min=1)
    elif mode == "seq-mean-token-sum-norm":
        if max_length is None:
            raise ValueError("mode 'seq-mean-token-sum-norm' needs max_length, the longest completion allowed")
        rows = rows / max_length
    return rows.sum() / denominator


def aggregation_unit(mode: str) -> str:
    """What `aggregate` counts in its denominator: "tokens" for token-mean, "rows" for the others.

    Raises:
        ValueError: an unknown mode.

    >>> aggregation_unit("token-mean"), aggregation_unit("seq-mean-token-sum")
    ('tokens', 'rows')
    """
    if mode not in _UNITS:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _UNITS))}, got {mode!r}")
    return _UNITS[mode]

"""Draw tokens from logits by the inverse distribution function: one uniform number per row, no generator."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.types import SamplingConfig

_BLOCK = 256  # above four of these, the running sum is taken over blocks, then within one block


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw from `[n, V]` logits with `[n]` numbers of `for_sampling`. Returns tokens and log-probs, `[n]`."""
    logits = logits.float()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    probs = _truncate(logits, sampling.top_k, sampling.top_p).softmax(-1)
    token = _invert(probs, uniform)
    return token, probs.gather(1, token.unsqueeze(1)).squeeze(1).log()


def for_sampling(uniform: Tensor, device: torch.device) -> Tensor:
    """Move to the device, as the precision to sum probabilities in; times any total stays below the total."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    return uniform.to(dtype).clamp(max=_largest(dtype)).to(device)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first column of `[n, V]` whose running sum exceeds `uniform * total`, `[n]`.

    A wide row is searched twice, first the sums of its blocks and then one block: a running sum over 64,000
    columns costs ten times their softmax.
    """
    columns = weights.shape[1]
    if columns <= 4 * _BLOCK:
        return _search(weights, uniform)[0]
    whole = columns - columns % _BLOCK
    sums = weights[:, :whole].reshape(len(weights), -1, _BLOCK).sum(-1)
    if whole < columns:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    block, beyond = _search(sums, uniform)  # what the number is beyond the block's start, as a share of the block
    into = (beyond / sums.gather(1, block.unsqueeze(1)).squeeze(1)).clamp(0, _largest(uniform.dtype))
    index = block.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, index.clamp(max=columns - 1)).masked_fill(index >= columns, 0.0)
    return (block * _BLOCK + _search(inside, into)[0]).clamp(max=columns - 1)


def _search(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first column whose running sum exceeds `uniform * total`, and the target's distance from the column's start.

    So a weight of zero is never drawn. The clamp matters for NaN.
    """
    cumulative = weights.cumsum(-1, dtype=uniform.dtype)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    column = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)
    start = cumulative.gather(1, column) - weights.gather(1, column)
    return column.squeeze(1), (target - start).squeeze(1)


def _largest(dtype: torch.dtype) -> float:
    return 1 - torch.finfo(dtype).eps


def _truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Forbid all but the `top_k` most likely tokens, then all but the fewest that hold `top_p` of the mass."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        probs = ranked.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return logits

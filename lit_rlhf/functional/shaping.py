"""Reward shaping: from scores of whole completions to what the advantages are computed from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def overlong_penalty(lengths: Int[Tensor, " N"], max_length: int, buffer: int) -> Float[Tensor, " N"]:
    """DAPO's soft punishment of long completions (arXiv 2503.14476), to be added to the reward.

        0 while |o| ≤ L − B;    (L − B − |o|)/B up to |o| = L;    −1 beyond

    Args:
        lengths: `[N]`, |o|, in tokens.
        max_length: L.
        buffer: B, the last tokens before L, over which the penalty grows; with 0 only |o| > L is punished.

    Raises:
        ValueError: a buffer below 0 or above `max_length`.

    >>> overlong_penalty(torch.tensor([80, 90, 100, 101]), max_length=100, buffer=20)
    tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer must be between 0 and max_length ({max_length}), got {buffer}")
    left = (max_length - buffer) - lengths.float()
    return (left / buffer if buffer else left).clamp(-1, 0)


def terminal_rewards(scores: Float[Tensor, " N"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Put each row's score on its last valid token, 0 elsewhere; a row without valid tokens gets none.

        r[i, t] = R_i · 1[t = max{t: m = 1}]

    Args:
        scores: `[N]`.
        mask: `[N, T]`, the valid tokens.

    >>> terminal_rewards(torch.tensor([2.0, 3.0]), torch.tensor([[True, True, False], [True, False, True]]))
    tensor([[0., 2., 0.],
            [0., 0., 3.]])
    """
    if scores.ndim != 1 or mask.ndim != 2 or len(scores) != len(mask):
        raise ValueError(f"scores must be [N] for a mask [N, T], got {tuple(scores.shape)} and {tuple(mask.shape)}")
    valid = mask.bool()
    later = valid.flip(1).cumsum(1).flip(1)  # valid tokens from t on
    return torch.where(valid & (later == 1), scores.unsqueeze(1), torch.zeros_like(scores).unsqueeze(1))


def add_scores(
    rewards: Float[Tensor, "*S"], scores: Float[Tensor, " N"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "*S"]:
    """Add a score per row to rewards `[N]`, or to rewards per token `[N, T]` on the row's last valid token.

    Args:
        rewards: `[N]` or `[N, T]`.
        scores: `[N]`.
        mask: `[N, T]`, the valid tokens.

    >>> add_scores(torch.tensor([[1.0, 2.0]]), torch.tensor([-0.5]), torch.tensor([[True, True]]))
    tensor([[1.0000, 1.5000]])
    """
    return rewards + (scores if rewards.ndim == 1 else terminal_rewards(scores, mask))

"""The built-in advantage estimators. Each returns advantages and returns `[N, T]`, 0 outside the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf import functional as F  # noqa: N812
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.functional.shaping import terminal_rewards
from lit_rlhf.ranks import mean_over_ranks, moments_over_ranks
from lit_rlhf.registry.names import register_adv_estimator


def _row_scores(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards `[N]`, or the sum over the valid tokens of `[N, T]`."""
    return rewards if rewards.ndim == 1 else zero_outside(rewards, mask).sum(1)


def _token_rewards(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards `[N, T]`, a `[N]` score on the last valid token alone, and which rows `[N, 1]` hold no NaN.

    A row that could not be scored must not make its neighbours NaN: its rewards count as 0 and it is left out after.
    """
    per_token = terminal_rewards(rewards, mask) if rewards.ndim == 1 else zero_outside(rewards, mask)
    return _without_nan(per_token), ~per_token.isnan().any(1, keepdim=True)


def _without_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), 0.0, x)


def _spread(per_row: Tensor, mask: Tensor) -> Tensor:
    return zero_outside(per_row.unsqueeze(1).expand(mask.shape), mask)


def _from_groups(scores: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and scores on every valid token; with γ = 1 the score is the return of each."""
    return _spread(advantages, mask), _spread(_without_nan(scores), mask)


@register_adv_estimator("group_normalize")
def _group_normalize(
    rewards: Tensor, mask: Tensor, group_ids: Tensor, scale_rewards: str = "std"
) -> tuple[Tensor, Tensor]:
    """GRPO: `functional.group_normalize` of the row scores, on every valid token."""
    scores = _row_scores(rewards, mask)
    if scale_rewards != "batch":
        return _from_groups(scores, F.group_normalize(scores, group_ids, scale_rewards), mask)
    var = moments_over_ranks(scores, mask.any(1) & ~scores.isnan())[1].to(
        scores.dtype
    )  # of all ranks, which a group never spans
    return _from_groups(scores, F.group_normalize(scores, group_ids, "none") / (var.sqrt() + 1e-4), mask)


@register_adv_estimator("rloo")
def _rloo(rewards: Tensor, mask: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """RLOO: `functional.leave_one_out` of the row scores, on every valid token."""
    scores = _row_scores(rewards, mask)
    return _from_groups(scores, F.leave_one_out(scores, group_ids), mask)


@register_adv_estimator("batch_mean")
def _batch_mean(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The row scores minus their mean over all ranks, on every valid token; 0 for a row with a NaN reward."""
    scores = _row_scores(rewards, mask)
    mean = mean_over_ranks(scores, mask.any(1) & ~scores.isnan()).to(scores.dtype)
    return _from_groups(scores, _without_nan(scores - mean), mask)


@register_adv_estimator("gae")
def _gae(
    rewards: Tensor,
    mask: Tensor,
    values: Tensor,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO: `functional.generalized_advantage_estimation`; a row with a NaN reward gets A = 0 and returns = values."""
    per_token, scored = _token_rewards(rewards, mask)
    advantages, returns = F.generalized_advantage_estimation(per_token, values, mask, gamma, gae_lambda, bootstrap)
    return torch.where(scored, advantages, 0.0), torch.where(scored, returns, zero_outside(values, mask))


@register_adv_estimator("rewards_to_go")
def _rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """REINFORCE: `functional.rewards_to_go`, as advantages and as returns; 0 for a row with a NaN reward."""
    per_token, scored = _token_rewards(rewards, mask)
    returns = torch.where(scored, F.rewards_to_go(per_token, mask, gamma), 0.0)
    return returns, returns

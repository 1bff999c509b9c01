"""Advantages: generalised advantage estimation, rewards to go, and baselines from a group of samples.

Time index: `values[i, t]` is the value *before* token t is emitted, `rewards[i, t]` comes with it. Masked-out
cells may hold anything; in the middle of a row (tool output) they are stepped over as though absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.functional.masked import zero_outside

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def generalized_advantage_estimation(
    rewards: Float[Tensor, "N T"],
    values: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438).

        δ_t = r_t + γ·V_{t+1} − V_t;    A_t = δ_t + γλ·A_{t+1};    ret_t = A_t + V_t

    where t + 1 is the next *valid* token of the row, and after the last one V = `bootstrap` (0 without) and A = 0.

    Args:
        rewards: `[N, T]`; a sequence's score lands on its last valid token alone.
        values: `[N, T]`, before each token.
        mask: `[N, T]`, the valid tokens.
        gamma: γ; 1 for language models, where the reward is terminal.
        gae_lambda: λ; 0 is the one-step error, 1 is the return minus the value.
        bootstrap: `[N]`, the value after the last token of a row that was cut short, 0 for a row that ended.

    Returns:
        Advantages and returns `[N, T]`, 0 outside the mask.

    Raises:
        ValueError: rewards that are not `[N, T]`.

    >>> r, v = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    >>> generalized_advantage_estimation(r, v, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, gae_lambda=0.8)
    (tensor([[0.2171, 0.2460, 0.3000]]), tensor([[0.7171, 0.8460, 1.0000]]))
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [N, T], one per token, got shape {tuple(rewards.shape)}")
    valid, r, v = mask.bool(), zero_outside(rewards, mask), zero_outside(values, mask)
    next_value = v.new_zeros(len(v)) if bootstrap is None else bootstrap
    next_advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        next_value = torch.where(valid[:, t], v[:, t], next_value)
        next_advantage = torch.where(valid[:, t], advantage, next_advantage)
        columns.append(advantage)
    advantages = zero_outside(torch.stack(columns[::-1], 1), mask) if columns else torch.zeros_like(r)
    return advantages, advantages + v


def rewards_to_go(rewards: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], gamma: float = 1.0) -> Float[Tensor, "N T"]:
    """Discounted sum of the rewards from each token on (REINFORCE, Williams 1992).

        G_t = r_t + γ·G_{t+1}        (t + 1: the next valid token of the row)

    It is GAE with λ = 1 and a value of 0. With γ = 1 and a terminal reward R, G_t = R at every valid token.

    Args:
        rewards: `[N, T]`.
        mask: `[N, T]`, the valid tokens.
        gamma: γ.

    Returns:
        `[N, T]`, 0 outside the mask.

    >>> rewards_to_go(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool), gamma=0.9)
    tensor([[5.2300, 4.7000, 3.0000]])
    """
    return generalized_advantage_estimation(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def group_normalize(
    rewards: Float[Tensor, " N"], group_ids: Int[Tensor, " N"], scale: str = "std", eps: float = 1e-4
) -> Float[Tensor, " N"]:
    """Advantage of each sample over its group's mean (GRPO, arXiv 2402.03300).

        A_i = (r_i − μ_g) / (σ + ε)

    σ is unbiased (ddof 1). A group whose rewards are all equal, and a group of one, get exactly 0. A NaN reward
    (not scorable) is left out of μ and σ and gets 0.

    Args:
        rewards: `[N]`, one per sample.
        group_ids: `[N]`, any integers in any order; rows of one prompt share one.
        scale: "std" divides by the group's σ, "batch" by that of all N rewards, "none" does not divide (Dr. GRPO,
            arXiv 2503.20783).
        eps: ε.

    Raises:
        ValueError: an unknown scale.

    >>> group_normalize(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 0]))
    tensor([ 0.8659, -0.8659, -0.8659,  0.8659])
    """
    if scale not in ("std", "none", "batch"):
        raise ValueError(f"scale must be 'std', 'none' or 'batch', got {scale!r}")
    groups = _groups(rewards, group_ids)
    if scale == "none":
        return groups.centred
    if scale == "std":
        squares = _per_group(groups.centred.square(), groups.group)
        variance = squares / (groups.size - 1).clamp(min=1)
    else:
        n = groups.scored.sum()
        values = torch.where(groups.scored, rewards.to(groups.centred), 0.0)
        deviation = torch.where(groups.scored, values - values.sum() / n.clamp(min=1), 0.0)
        variance = (deviation.square().sum() / (n - 1).clamp(min=1)).expand_as(values)
    # √ of a live group's variance only: the others' is 0, where √ has an infinite gradient
    return groups.centred / (torch.where(groups.live, variance, 1.0).sqrt() + eps)


def leave_one_out(rewards: Float[Tensor, " N"], group_ids: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Advantage of each sample over the mean of the *others* of its group (RLOO, arXiv 2402.14740; Kool 2019).

        A_i = r_i − Σ_{j≠i} r_j / (G − 1) = G/(G − 1) · (r_i − μ_g)

    A group whose rewards are all equal, a group of one, and a NaN reward get exactly 0.

    Args:
        rewards: `[N]`, one per sample.
        group_ids: `[N]`, any integers in any order.

    >>> leave_one_out(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([7, 7, 7]))
    tensor([ 1.5000, -1.5000,  0.0000])
    """
    groups = _groups(rewards, group_ids)
    return groups.centred * groups.size / (groups.size - 1).clamp(min=1)


class _Groups(NamedTuple):
    """What a row knows of its group; every field is `[N]`."""

    group: Tensor  # dense group number
    scored: Tensor  # the reward is not NaN
    live: Tensor  # scored, and the group's rewards differ
    size: Tensor  # scored rows of the group
    centred: Tensor  # r − μ, exactly 0 unless live


def _groups(rewards: Tensor, group_ids: Tensor) -> _Groups:
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards and group_ids must both be [N], got {tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    index = torch.unique(group_ids, return_inverse=True)[1]
    scored = ~rewards.isnan()
    r = torch.where(scored, rewards, 0.0)
    count = _per_group(scored.to(r), index)
    mean = _per_group(r, index) / count.clamp(min=1)
    high, low = (
        torch.full_like(r, -sign * torch.inf).scatter_reduce(
            0, index, torch.where(scored, r.detach(), -sign * torch.inf), reduce
        )[index]
        for sign, reduce in ((1, "amax"), (-1, "amin"))
    )
    live = scored & (high > low)  # compared, not σ > 0: equal rewards leave float noise in σ
    return _Groups(index, scored, live, count, torch.where(live, r - mean, 0.0))


def _per_group(x: Tensor, index: Tensor) -> Tensor:
    """Sum `x` over each row's group: `[N]`."""
    return torch.zeros_like(x).index_add(0, index, x)[index]

"""The built-in policy losses. Each returns `[N, T]` and detached `[N, T]` metrics, which the caller averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_rlhf import functional as F  # noqa: N812
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.functional.policy_losses import policy_ratio, product_ratio, sequence_ratio
from lit_rlhf.registry.names import register_policy_loss


@register_policy_loss("clip")
def _clip(
    old_logp: Tensor,
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO, GRPO, DAPO: `functional.clipped_policy_loss`."""
    old, new, adv = (zero_outside(x, mask) for x in (old_logp, logp, advantages))
    loss = F.clipped_policy_loss(new, old, adv, clip_ratio_low, clip_ratio_high, dual_clip)
    return loss, F.clip_statistics(policy_ratio(new, old), adv, clip_ratio_low, clip_ratio_high)


def _by_sequence(loss_of: Callable[..., Tensor], ratio_of: Callable[..., Tensor], low: float, high: float) -> Any:
    """A loss that clips a ratio of the sequence; the clip statistics are of that ratio, on each of the row's tokens."""

    def loss(
        old_logp: Tensor,
        logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        clip_ratio_low: float = low,
        clip_ratio_high: float = high,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ratio, adv = (zero_outside(x, mask) for x in (ratio_of(logp, old_logp, mask), advantages))
        stats = F.clip_statistics(ratio, adv, clip_ratio_low, clip_ratio_high)
        found = loss_of(logp, old_logp, advantages, mask, clip_ratio_low, clip_ratio_high)
        return found, {name: zero_outside(value, mask) for name, value in stats.items()}

    return loss


register_policy_loss("gspo")(_by_sequence(F.gspo_policy_loss, sequence_ratio, 3e-4, 4e-4))
register_policy_loss("gspo_token")(_by_sequence(F.gspo_token_policy_loss, sequence_ratio, 3e-4, 4e-4))
register_policy_loss("sequence_clip")(_by_sequence(F.sequence_clipped_policy_loss, product_ratio, 0.2, 0.2))


@register_policy_loss("cispo")
def _cispo(
    old_logp: Tensor,
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_min: float = 0.0,
    clip_max: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO: `functional.cispo_policy_loss`; the clip statistics are of its absolute bounds."""
    old, new, adv = (zero_outside(x, mask) for x in (old_logp, logp, advantages))
    loss = F.cispo_policy_loss(new, old, adv, clip_min, clip_max)
    return loss, F.clip_statistics(policy_ratio(new, old), adv, 1 - clip_min, clip_max - 1)


@register_policy_loss("reinforce", ratio=False)
def _reinforce(old_logp: Tensor, logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE, RLOO, ReMax: the score function, −A·log π."""
    return -zero_outside(advantages, mask).detach() * zero_outside(logp, mask), {}

"""Policy and value losses, per token, to be minimised. `aggregation.aggregate` turns them into a scalar.

ρ = exp(lp − lp_old), with the log-ratio clamped to ±20. Gradients reach `logprobs` (or `values`) alone: old
log-probs, advantages, weights, old values and returns are detached here. Functions without a mask are
elementwise: put masked-out cells through `masked.zero_outside` first if they may be NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf.functional.kl import LOG_RATIO_LIMIT
from lit_rlhf.functional.masked import zero_outside

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def policy_ratio(logprobs: Float[Tensor, "*S"], old_logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Ratio of the policy's probability now to before.

        ρ = exp(clamp(lp − lp_old, ±20))

    >>> policy_ratio(torch.tensor([-1.0, 99.0]), torch.tensor([-1.0, 0.0]))
    tensor([1.0000e+00, 4.8517e+08])
    """
    return (logprobs - old_logprobs.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def sequence_ratio(
    logprobs: Float[Tensor, "N T"], old_logprobs: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """GSPO's length-normalised ratio of a whole sequence, on each of its tokens.

        s_i = exp( 1/|o_i| · Σ_t m·(lp − lp_old) )        (1 for a row without valid tokens)

    >>> lp, mask = torch.tensor([[0.1, -0.1, 0.3]]), torch.ones(1, 3, dtype=torch.bool)
    >>> sequence_ratio(lp, torch.zeros(1, 3), mask)
    tensor([[1.1052, 1.1052, 1.1052]])
    """
    log_ratio = zero_outside(logprobs, mask) - zero_outside(old_logprobs, mask).detach()
    mean = log_ratio.sum(1, keepdim=True) / mask.bool().sum(1, keepdim=True).clamp(min=1)
    return mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().expand_as(logprobs)


def product_ratio(
    logprobs: Float[Tensor, "N T"], old_logprobs: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """Ratio of a whole completion's probability now to before, on each of its tokens.

        ρ_i = exp( Σ_t m·(lp − lp_old) )

    >>> lp, mask = torch.tensor([[0.1, -0.1, 0.3]]), torch.ones(1, 3, dtype=torch.bool)
    >>> product_ratio(lp, torch.zeros(1, 3), mask)
    tensor([[1.3499, 1.3499, 1.3499]])
    """
    log_ratio = zero_outside(logprobs, mask) - zero_outside(old_logprobs, mask).detach()
    return log_ratio.sum(1, keepdim=True).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().expand_as(logprobs)


def clipped_policy_loss(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Tensor, "N T"]:
    """PPO's clipped objective (arXiv 1707.06347), with DAPO's two clip ratios (arXiv 2503.14476).

        ℓ = −min( ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A )

    One range for either sign of A. The dual clip (arXiv 1912.09729) bounds what a negative advantage can cost:
    ℓ = min(ℓ, −c·A) where A < 0.

    Args:
        logprobs: `[N, T]` of the policy now.
        old_logprobs: `[N, T]` at the start of the update phase.
        advantages: `[N, T]`.
        clip_ratio_low: ε_low.
        clip_ratio_high: ε_high.
        dual_clip: c, above 1; `None` for no dual clip.

    Raises:
        ValueError: a `dual_clip` that is not above 1.

    >>> ratio = torch.tensor([0.5, 1.0, 1.5])
    >>> clipped_policy_loss(ratio.log(), torch.zeros(3), torch.ones(3))
    tensor([-0.5000, -1.0000, -1.2000])
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    ratio = policy_ratio(logprobs, old_logprobs)
    return _clipped(ratio, advantages.detach(), clip_ratio_low, clip_ratio_high, dual_clip)


def gspo_policy_loss(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    clip_ratio_low: float = 3e-4,
    clip_ratio_high: float = 4e-4,
) -> Float[Tensor, "N T"]:
    """Group Sequence Policy Optimization (arXiv 2507.18071): the clip acts on the ratio of the whole sequence.

        s_i = exp( 1/|o_i| · Σ_t m·(lp − lp_old) );    ℓ = −min( s_i·A, clip(s_i, 1 − ε_low, 1 + ε_high)·A )

    Every token of a row carries the row's loss, so `aggregate(..., "seq-mean-token-mean")` is the paper's
    objective, with ∂s_i/∂lp_t = s_i/|o_i|.

    Args:
        logprobs: `[N, T]` of the policy now.
        old_logprobs: `[N, T]` at the start of the update phase.
        advantages: `[N, T]`, constant over the tokens of a row in the paper.
        mask: `[N, T]`, the valid tokens.
        clip_ratio_low: ε_low; the paper's is 3e-4.
        clip_ratio_high: ε_high; the paper's is 4e-4.

    Returns:
        `[N, T]`, 0 outside the mask.

    >>> lp, ones = torch.tensor([[0.1, -0.1, 0.3]]), torch.ones(1, 3)
    >>> gspo_policy_loss(lp, torch.zeros(1, 3), -ones, ones.bool())
    tensor([[1.1052, 1.1052, 1.1052]])
    """
    ratio = sequence_ratio(logprobs, old_logprobs, mask)
    return _clipped_inside(ratio, advantages, mask, clip_ratio_low, clip_ratio_high)


def gspo_token_policy_loss(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    clip_ratio_low: float = 3e-4,
    clip_ratio_high: float = 4e-4,
) -> Float[Tensor, "N T"]:
    """GSPO-token (arXiv 2507.18071, eq. 14): the sequence's ratio in value, each token's own in gradient.

        s_it = sg(s_i)·exp(lp_t − sg(lp_t));    ℓ = −min( s_it·A_it, clip(s_it, 1 − ε_low, 1 + ε_high)·A_it )

    Under "seq-mean-token-mean" equal to GSPO, in value and gradient, where A is constant over a row; it also takes
    advantages per token. Arguments as in `gspo_policy_loss`.

    >>> lp, ones = torch.tensor([[0.1, -0.1, 0.3]]), torch.ones(1, 3)
    >>> gspo_token_policy_loss(lp, torch.zeros(1, 3), -ones, ones.bool())
    tensor([[1.1052, 1.1052, 1.1052]])
    """
    lp = zero_outside(logprobs, mask)
    ratio = sequence_ratio(logprobs, old_logprobs, mask).detach() * (lp - lp.detach()).exp()
    return _clipped_inside(ratio, advantages, mask, clip_ratio_low, clip_ratio_high)


def sequence_clipped_policy_loss(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
) -> Float[Tensor, "N T"]:
    """PPO's clip on the ratio of the whole completion, the product of its tokens' ratios: RLOO over several steps.

        ρ_i = exp( Σ_t m·(lp − lp_old) );    ℓ = −min( ρ_i·A, clip(ρ_i, 1 − ε_low, 1 + ε_high)·A )

    Every token of a row carries the row's loss, so that "seq-mean-token-mean" is the mean over completions. At
    ρ = 1 its gradient is that of −A·Σ_t lp, which is RLOO's (arXiv 2402.14740). Arguments as in `gspo_policy_loss`.

    >>> lp, ones = torch.tensor([[0.1, -0.1, 0.3]]), torch.ones(1, 3)
    >>> sequence_clipped_policy_loss(lp, torch.zeros(1, 3), -ones, ones.bool())
    tensor([[1.3499, 1.3499, 1.3499]])
    """
    ratio = product_ratio(logprobs, old_logprobs, mask)
    return _clipped_inside(ratio, advantages, mask, clip_ratio_low, clip_ratio_high)


def cispo_policy_loss(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    clip_min: float = 0.0,
    clip_max: float = 5.0,
) -> Float[Tensor, "N T"]:
    """CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE with a clipped, detached importance weight.

        ℓ = −sg(clip(ρ, clip_min, clip_max))·A·lp

    No token loses its gradient. The bounds are absolute, not 1 ± ε.

    Args:
        logprobs: `[N, T]` of the policy now.
        old_logprobs: `[N, T]` at the start of the update phase.
        advantages: `[N, T]`.
        clip_min: least weight.
        clip_max: greatest weight.

    >>> lp, ratio = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.5, 1.0, 3.0])
    >>> cispo_policy_loss(lp, lp - ratio.log(), torch.ones(3), clip_max=2.0)
    tensor([0.5000, 2.0000, 6.0000])
    """
    weight = policy_ratio(logprobs, old_logprobs).detach().clamp(clip_min, clip_max)
    return -weight * advantages.detach() * logprobs


def clipped_value_loss(
    values: Float[Tensor, "N T"], old_values: Float[Tensor, "N T"], returns: Float[Tensor, "N T"], clip: float | None
) -> Float[Tensor, "N T"]:
    """PPO's value loss, clipped around the values at rollout (arXiv 2403.17031).

        ℓ = ½·max( (V − ret)², (clip(V, V_old − ε, V_old + ε) − ret)² )

    Args:
        values: `[N, T]` now.
        old_values: `[N, T]` at rollout.
        returns: `[N, T]`, the targets.
        clip: ε; `None` for the plain ½·(V − ret)².

    >>> clipped_value_loss(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.ones(2), clip=0.2)
    tensor([0.3200, 0.4050])
    """
    old, target = old_values.detach(), returns.detach()
    error = (values - target).square()
    if clip is None:
        return 0.5 * error
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (clipped - target).square())


def importance_weights(
    logprobs: Float[Tensor, "*S"],
    behavior_logprobs: Float[Tensor, "*S"],
    clip_min: float | Tensor = 0.5,
    clip_max: float = 2.0,
    staleness_decay: float = 1.0,
    version_gap: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, "*S"]:
    """Weights that correct for samples of another policy, detached.

        w = clip( exp(lp − lp_b), clip_min, clip_max ) · decay^gap

    Clip first, then decay, so that a stale weight can fall under `clip_min`. The weight belongs *outside* a
    clipped ratio to π_old, and `logprobs` are then π_old's (arXiv 2110.00641).

    Args:
        logprobs: `[N, T]` per token, or `[N]` summed over each sequence.
        behavior_logprobs: the same under the policy that sampled.
        clip_min: least weight before decay, or one for each weight; with 0 the weights are truncated from above alone.
        clip_max: greatest weight.
        staleness_decay: decay, at most 1.
        version_gap: `[N]`, versions between the sampling weights and the current ones; `None` for 0.

    >>> w = torch.tensor([[0.2, 1.0, 5.0]])
    >>> importance_weights(w.log(), torch.zeros(1, 3), staleness_decay=0.99, version_gap=torch.tensor([3]))
    tensor([[0.4851, 0.9703, 1.9406]])
    """
    raw = policy_ratio(logprobs, behavior_logprobs).detach()
    weights = torch.maximum(raw.clamp(max=clip_max), torch.as_tensor(clip_min, dtype=raw.dtype, device=raw.device))
    if version_gap is None:
        return weights
    decay = staleness_decay ** version_gap.to(weights.dtype)
    return weights * (decay.unsqueeze(1) if weights.ndim == 2 else decay)


def clip_statistics(
    ratio: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"], clip_ratio_low: float, clip_ratio_high: float
) -> dict[str, Float[Tensor, "N T"]]:
    """Where a clip to [1 − ε_low, 1 + ε_high] acts, as 0/1 per token, detached; to be averaged over the mask.

        clip_fraction_low  = ρ < 1 − ε_low  and A < 0        clip_fraction_high = ρ > 1 + ε_high and A > 0
        clip_fraction      = low + high (the tokens whose gradient the clip removes)
        ratio_out_of_range = ρ outside the range, whatever the sign of A

    Args:
        ratio: `[N, T]`, from `policy_ratio` or `sequence_ratio`.
        advantages: `[N, T]`.
        clip_ratio_low: ε_low.
        clip_ratio_high: ε_high.

    >>> stats = clip_statistics(torch.tensor([0.5, 0.5, 1.5]), torch.tensor([1.0, -1.0, 1.0]), 0.2, 0.2)
    >>> stats["clip_fraction"], stats["ratio_out_of_range"]
    (tensor([0., 1., 1.]), tensor([1., 1., 1.]))
    """
    below, above = ratio.detach() < 1 - clip_ratio_low, ratio.detach() > 1 + clip_ratio_high
    low, high = below & (advantages < 0), above & (advantages > 0)
    return {
        "clip_fraction": (low | high).float(),
        "clip_fraction_low": low.float(),
        "clip_fraction_high": high.float(),
        "ratio_out_of_range": (below | above).float(),
    }


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None) -> Tensor:
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def _clipped_inside(ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """`_clipped` on the cells of the mask, 0 elsewhere."""
    return zero_outside(_clipped(ratio, zero_outside(advantages, mask).detach(), low, high, None), mask)

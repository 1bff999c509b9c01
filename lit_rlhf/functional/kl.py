"""Estimates of the KL divergence from log-probabilities of sampled tokens (Schulman 2020).

"Approximating KL Divergence", http://joschu.net/blog/kl-approx.html. `kl_estimate` is for samples of the policy itself,
against the reference; `approx_kl` for samples of the policy before the update. They differ in the sign inside k3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

LOG_RATIO_LIMIT = 20.0  # log-ratios are clamped to ±this before exp


def kl_estimate(
    logprobs: Float[Tensor, "N T"], ref_logprobs: Float[Tensor, "N T"], estimator: str = "k1"
) -> Float[Tensor, "N T"]:
    """Estimate KL(π‖π_ref) per token, in nats, from tokens sampled from π (Schulman 2020).

        Δ = lp − lp_ref;    k1 = Δ;    k2 = ½·Δ²;    k3 = exp(−Δ) − 1 + Δ

    E[k1] = E[k3] = KL. As a loss only k2 (or ρ·k3) has the gradient of KL(π‖π_ref): E[∇k1] = 0, and E[∇k3] is
    the gradient of KL(π_ref‖π). In the reward, k1. Δ is clamped to ±20 in k3; no gradient reaches the reference.

    Args:
        logprobs: `[N, T]` of the policy.
        ref_logprobs: `[N, T]` of the frozen reference.
        estimator: "k1", "k2" or "k3".

    >>> import torch
    >>> lp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5])
    >>> kl_estimate(lp, ref), kl_estimate(lp, ref, "k2"), kl_estimate(lp, ref, "k3")
    (tensor([ 0.5000, -0.5000]), tensor([0.1250, 0.1250]), tensor([0.1065, 0.1487]))
    """
    return _estimate(logprobs - ref_logprobs.detach(), estimator)


def exact_kl(
    logits: Float[Tensor, "*S V"], ref_logits: Float[Tensor, "*S V"], temperature: float = 1.0
) -> Float[Tensor, "*S"]:
    """KL(π‖π_ref) of the next-token distributions in nats: a sum over the vocabulary, no estimate from one token.

        KL = Σ_v π_v·(log π_v − log π_ref,v),    π = softmax(z/τ)

    Its gradient is that of the KL, token by token, with the state distribution held fixed.

    Args:
        logits: `[N, T, V]`, or flat `[K, V]`, of the policy.
        ref_logits: the same of the frozen reference; no gradient reaches them.
        temperature: τ, the sampling temperature.

    >>> import torch
    >>> exact_kl(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.4, 0.4, 0.2]]).log())
    tensor([0.0253])
    """
    lowest = torch.finfo(torch.float32).min  # −inf: a token forbidden in both adds 0 and not NaN
    logp, logq = (
        (z if z.dtype == torch.float64 else z.float()).div(temperature).clamp(min=lowest).log_softmax(-1)
        for z in (logits, ref_logits.detach())
    )
    return (logp.exp() * (logp - logq)).sum(-1)


def approx_kl(
    logprobs: Float[Tensor, "N T"], old_logprobs: Float[Tensor, "N T"], estimator: str = "k3"
) -> Float[Tensor, "N T"]:
    """Estimate KL(π_old‖π) per token in nats, from tokens of π_old: how far an update has moved (Schulman 2020).

        d = lp − lp_old;    k1 = −d;    k2 = ½·d²;    k3 = exp(d) − 1 − d

    d is clamped to ±20 in k3.

    Args:
        logprobs: `[N, T]` of the policy now.
        old_logprobs: `[N, T]` of the policy that the update phase began with.
        estimator: "k1", "k2" or "k3".

    >>> import torch
    >>> approx_kl(torch.tensor([-0.9, -1.1]), torch.tensor([-1.0, -1.0])).mean()
    tensor(0.0050)
    """
    return _estimate(old_logprobs.detach() - logprobs, estimator)


def _estimate(delta: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return 0.5 * delta.square()
    if estimator == "k3":
        delta = delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return (-delta).expm1() + delta
    raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")


def adaptive_kl_coef(coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """Move the KL coefficient towards a target KL (Ziegler et al., arXiv 1909.08593, eq. 3).

        e = clip(KL/target − 1, ±0.2);    β ← β·(1 + e·n/horizon)

    Args:
        coef: β.
        kl: KL to the reference, nats summed over a completion, mean over the completions.
        target: the KL wanted, in the same unit.
        horizon: episodes over which the coefficient adapts.
        episodes: n, completions since the last call, over all ranks.

    >>> round(adaptive_kl_coef(0.2, kl=9.0, target=6.0, horizon=10_000, episodes=256), 6)
    0.201024
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * episodes / horizon)


def doubling_coef(coef: float, kl: float, target: float, lowest: float, highest: float) -> float:
    """Double or halve a penalty's coefficient (PPO, arXiv 1707.06347, section 4).

        c ← 2c  where KL > 1.5·target;    c ← c/2  where KL < target/1.5;    within [lowest, highest]

    >>> doubling_coef(0.1, kl=0.05, target=0.01, lowest=0.001, highest=10.0)
    0.2
    """
    factor = 2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0
    return min(max(coef * factor, lowest), highest)

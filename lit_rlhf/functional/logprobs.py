"""Log-probability and entropy of tokens under logits.

Logits at sequence position j predict token j + 1: for the response token at absolute position P + t, pass the
logits at P + t − 1. Both functions work at the *sampling* temperature, in float32 (float64 stays float64): in
bfloat16 the ratio of two policies drifts by a per cent with no update between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def token_logprobs(
    logits: Float[Tensor, "*S V"], ids: Int[Tensor, "*S"], temperature: float = 1.0
) -> Float[Tensor, "*S"]:
    """Log-probability of each token, in nats, under softmax(logits / temperature).

        lp = z_y/τ − log Σ_v exp(z_v/τ)

    Args:
        logits: `[N, T, V]`, or flat `[K, V]`: the logits that predict `ids`, already shifted by one.
        ids: `[N, T]` or `[K]`, the tokens.
        temperature: τ, the temperature the tokens were sampled at.

    Raises:
        ValueError: logits and ids whose shapes do not fit, or a temperature that is not above 0.

    >>> token_logprobs(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))
    tensor([-0.4076])
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be the shape of ids {tuple(ids.shape)} plus a vocabulary")
    scaled = _scale(logits, temperature)
    return -F.cross_entropy(scaled.reshape(-1, scaled.shape[-1]), ids.reshape(-1), reduction="none").view(ids.shape)


def token_entropy(logits: Float[Tensor, "*S V"], temperature: float = 1.0) -> Float[Tensor, "*S"]:
    """Entropy of softmax(logits / temperature), in nats, over the whole vocabulary.

        H = log Σ_v exp(u_v) − Σ_v softmax(u)_v · u_v,   u = z/τ

    This and not −lp is the entropy bonus: −lp has the right mean, but its gradient has mean 0. Logits of −inf
    (forbidden tokens) count as probability 0.

    Args:
        logits: `[N, T, V]`, or flat `[K, V]`.
        temperature: τ, the sampling temperature.

    >>> token_entropy(torch.tensor([[2.0, 1.0, 0.0]]))
    tensor([0.8324])
    """
    scaled = _scale(logits, temperature)
    scaled = scaled.clamp(min=torch.finfo(scaled.dtype).min)
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that no token can be scored at."""
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0 to score tokens, got {temperature}")


def _scale(logits: Tensor, temperature: float) -> Tensor:
    check_temperature(temperature)
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    return scaled if temperature == 1.0 else scaled / temperature

"""The one scoring path: per-token log-probs and entropy of completions under any causal language model.

Every algorithm is a small function of these numbers, so padding, alignment, temperature and the choice of
logits that are computed at all are decided here and nowhere else.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.functional import token_entropy, token_logprobs


@dataclass(frozen=True)
class Scores:
    """What a forward pass says about the completions; zero where `response_mask` is false."""

    logprobs: Tensor  # [N, T] float32, log pi(o_t | prompt, o_<t) at the sampling temperature
    entropy: Tensor | None = None  # [N, T] nats, of the whole distribution at the same positions


def score(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Scores:
    """Teacher-forced log-probs of `response_ids` given `prompt_ids`.

    Logits are computed only at the positions that predict a masked-in token; position ids are explicit, so
    left padding changes nothing (ALGORITHMS: logits at position P+t-1 predict response token t).

    Args:
        model: a Hugging Face causal language model.
        prompt_ids: `[N, P]` int64, left-padded; what stands in padded cells does not matter.
        prompt_mask: `[N, P]` bool.
        response_ids: `[N, T]` int64, right-padded.
        response_mask: `[N, T]` bool; false cells before a row's last true one are tokens that the policy
            read but did not sample (a tool's output): they are attended to and not scored.
        temperature: the sampling temperature that the logits are divided by.
        entropy: also return the entropy, in nats.
    """
    P, T = prompt_ids.shape[1], response_ids.shape[1]
    prompt_mask, response_mask = prompt_mask.bool(), response_mask.bool()
    attended = response_mask.flip(1).cumsum(1).flip(1) > 0
    mask = torch.cat([prompt_mask, attended], dim=1)
    ids = torch.cat([prompt_ids, response_ids], dim=1).masked_fill(~mask, 0)
    predicts = torch.zeros_like(mask)
    predicts[:, P - 1 : P + T - 1] = response_mask

    logits = _logits_at(model, ids, mask, predicts)
    targets = response_ids[response_mask]
    logprobs = _scatter(token_logprobs(logits, targets, temperature), response_mask)
    return Scores(logprobs, _scatter(token_entropy(logits, temperature), response_mask) if entropy else None)


def _logits_at(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Logits `[K, V]` at the K true cells of `positions` `[N, L]`, row by row."""
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept: Tensor = model(**arguments, logits_to_keep=positions).logits
        return kept
    full: Tensor = model(**arguments).logits
    return full[positions]


def _scatter(flat: Tensor, mask: Tensor) -> Tensor:
    """Put K numbers on the K true cells of `mask`, zero elsewhere: `[N, T]`, differentiable."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

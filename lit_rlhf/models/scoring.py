"""The one scoring path: per-token log-probs, entropy, KL and values of completions under any causal language model.

Every algorithm is a small function of these numbers, so padding, alignment, temperature and the choice of
logits that are computed at all are decided here and nowhere else.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.functional import exact_kl, token_entropy, token_logprobs
from lit_rlhf.models.adapters import without_adapters
from lit_rlhf.types import CompletionBatch, Rollout

Completions = Rollout | CompletionBatch


@dataclass(frozen=True)
class Scores:
    """What a forward pass says about the completions; zero where `response_mask` is false."""

    logprobs: Tensor  # [N, T] float32, log pi(o_t | prompt, o_<t) at the sampling temperature
    entropy: Tensor | None = None  # [N, T] nats, of the whole distribution at the same positions
    kl: Tensor | None = None  # [N, T] nats, exact KL(policy, reference) at the same positions
    values: Tensor | None = None  # [N, T] V before emitting token t


@dataclass(frozen=True)
class Values:
    """What a scalar head says about the completions."""

    values: Tensor  # [N, T] before emitting token t; zero where `response_mask` is false
    last: Tensor  # [N] after the last token: what a completion that was cut off would go on to earn, or its reward


def score(
    model: nn.Module,
    rows: Completions,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = True,
    reference: nn.Module | None = None,
    head: nn.Module | None = None,
) -> Scores:
    """Teacher-forced log-probs of the rows' responses given their prompts.

    Logits are computed only at the positions that predict a masked-in token; position ids are explicit, so
    left padding changes nothing (ALGORITHMS: logits at position P+t-1 predict response token t).

    Args:
        model: a Hugging Face causal language model.
        rows: prompts `[N, P]`, left-padded, and responses `[N, T]`, right-padded; what stands in padded cells does
            not matter. False cells of `response_mask` before a row's last true one are tokens that the policy
            read but did not sample (a tool's output): they are attended to and not scored.
        temperature: the sampling temperature that the logits are divided by.
        entropy: also return the entropy, in nats.
        entropy_gradient: with its gradient; without, nothing of it is kept for the backward pass.
        reference: also return the exact KL to this model without its adapters, if it has any, summed over the
            vocabulary.
        head: also return the values of this head on the model's last hidden states.
    """
    ids, mask, predicts = _arrange(rows)
    responses = rows.response_mask.bool()
    logits, hidden = _forward(model, ids, mask, predicts, with_hidden=head is not None)
    logprobs = _scatter(token_logprobs(logits, rows.response_ids[responses], temperature), responses)
    found = {}
    if entropy:
        found["entropy"] = _scatter(
            token_entropy(logits if entropy_gradient else logits.detach(), temperature), responses
        )
    if reference is not None:
        with torch.no_grad(), without_adapters(reference):
            ref_logits, _ = _forward(reference, ids, mask, predicts)
        found["kl"] = _scatter(exact_kl(logits, ref_logits, temperature), responses)
    if head is not None and hidden is not None:
        found["values"] = _scatter(head(hidden[predicts]), responses)
    return Scores(logprobs, **found)


def score_values(trunk: nn.Module, head: nn.Module, rows: Completions) -> Values:
    """Values of the rows' responses: the head read at the same positions as the logits.

    Args:
        trunk: a Hugging Face model without a language-modelling head.
        head: hidden states `[..., H]` to numbers `[...]`.
        rows: see `score`.
    """
    ids, mask, predicts = _arrange(rows)
    hidden = trunk(**_arguments(ids, mask)).last_hidden_state
    end = torch.arange(mask.shape[1], device=mask.device).expand_as(mask).masked_fill(~mask, -1).argmax(1)
    last = head(hidden[torch.arange(len(end), device=end.device), end])
    return Values(_scatter(head(hidden[predicts]), rows.response_mask.bool()), last)


def _arrange(rows: Completions) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the attended cells, and the cells that predict a masked-in token, all `[N, P + T]`."""
    P, T = rows.prompt_ids.shape[1], rows.response_ids.shape[1]
    responses = rows.response_mask.bool()
    attended = responses.flip(1).cumsum(1).flip(1) > 0
    mask = torch.cat([rows.prompt_mask.bool(), attended], dim=1)
    ids = torch.cat([rows.prompt_ids, rows.response_ids], dim=1).masked_fill(~mask, 0)
    predicts = torch.zeros_like(mask)
    predicts[:, P - 1 : P + T - 1] = responses
    return ids, mask, predicts


def _arguments(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }


def _forward(
    model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, with_hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits `[K, V]` at the K true cells of `positions` `[N, L]`, row by row; the last hidden states `[N, L, H]`."""
    selects = "logits_to_keep" in inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": positions} if selects else {}
    extra |= {"output_hidden_states": True} if with_hidden else {}
    found = model(**_arguments(ids, mask), **extra)
    logits: Tensor = found.logits if selects else found.logits[positions]
    return logits, found.hidden_states[-1] if with_hidden else None


def _scatter(flat: Tensor, mask: Tensor) -> Tensor:
    """Put K numbers on the K true cells of `mask`, zero elsewhere: `[N, T]`, differentiable."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

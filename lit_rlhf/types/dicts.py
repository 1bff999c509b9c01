"""Batches as plain dictionaries of tensors, in the formats of Signal's documentation, for rollouts of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.types.batches import CompletionBatch, PreferenceBatch
from lit_rlhf.types.dict_fields import Fields, check_finite, check_ids, check_keys, given_keys
from lit_rlhf.types.field_docs import with_fields
from lit_rlhf.types.preference_dicts import OPTIONAL, REQUIRED, preference_batch_from_dict


@with_fields
@dataclass(frozen=True, kw_only=True)
class GivenCompletions(CompletionBatch):
    """Completions of a user's own with their rewards, and whatever else is known of them; zero on cells not sampled."""

    rewards: Tensor  # [N] or [N, T]
    group_ids: Tensor  # [N] int64, rows of one prompt share one id
    old_logprobs: Tensor | None = None  # [N, T] under the policy at the start of the update phase
    behavior_logprobs: Tensor | None = None  # [N, T] under the policy that sampled; [N] where only the sum is known
    values: Tensor | None = None  # [N, T] before emitting token t, for the advantages
    old_values: Tensor | None = None  # [N, T] that the value clip is about
    advantages: Tensor | None = None  # [N, T]
    greedy_rewards: Tensor | None = None  # [N] reward of the prompt's greedy completion (ReMax)


_ROWS = (
    ("input_ids", "attention_mask", "rewards"),
    ("old_log_probs", "behavior_log_probs", "response_mask", "values", "old_values", "advantages"),
)
_GROUPS = (
    ("prompt_ids", "response_ids", "rewards", "response_masks"),
    ("prompt_masks", "old_log_probs", "behavior_log_probs", "greedy_rewards"),
)
_PAIRS = (REQUIRED, OPTIONAL)


def from_dict(batch: Mapping[str, Any], pad_token_id: int = 0) -> GivenCompletions | PreferenceBatch:
    """A batch of tensors (or of lists) by key, as one of ours. The keys tell the format.

    Rows, of whole sequences padded on any side. Entry t of what is `[B, L]` belongs to token t of `input_ids`:

    - `input_ids`, `attention_mask` `[B, L]`;
    - `rewards` `[B, L]`, per token, or `[B]`, which goes on the last sampled token alone;
    - `old_log_probs` `[B, L]`, or `behavior_log_probs`, `[B, L]` or, summed over the sampled tokens, `[B]`, or both;
    - optionally `response_mask` `[B, L]`, the sampled tokens, by default all that are attended to; never the row's
      first one, which nothing predicts;
    - optionally `values` and `old_values` `[B, L]`, `advantages` `[B, L]` or `[B]`.

    Groups, G samples of each prompt:

    - `prompt_ids` `[B, P]`, `response_ids` `[B, G, R]`, `rewards` `[B, G]`, `response_masks` `[B, G, R]`;
    - optionally `prompt_masks` `[B, P]`, without which `pad_token_id` at either end of a prompt is padding;
      `old_log_probs` `[B, G, R]`; `behavior_log_probs` `[B, G, R]` or `[B, G]`; `greedy_rewards` `[B]`, for ReMax.

    Pairs: `chosen_input_ids`, `chosen_attention_mask`, `rejected_input_ids`, `rejected_attention_mask`, and
    `margin` where the pairs have one, see `preference_batch_from_dict`.

    Returns:
        Completions in our layout: prompts left-padded, responses right-padded; of rows the prompt is the first token.

    Raises:
        InputError: a key is unknown or missing, or its value is of the wrong type or shape; the sentence names the
            key, what was given and what is expected.

    >>> one_prompt = {"prompt_ids": [[5, 6]], "response_ids": [[[7, 1], [8, 9]]], "rewards": [[1.0, 0.0]]}
    >>> rows = from_dict({**one_prompt, "response_masks": [[[1, 1], [1, 0]]]})
    >>> rows.prompt_ids.tolist(), rows.rewards.tolist(), rows.response_mask.sum(1).tolist()
    ([[5, 6], [5, 6]], [1.0, 0.0], [2, 1])
    """
    given = given_keys(batch)
    formats = (_ROWS, _GROUPS, _PAIRS)
    own = [len({*required, *optional} & given.keys()) for required, optional in formats]
    if own.count(max(own)) > 1:
        choices = "; or ".join(", ".join(required) for required, _ in formats)
        raise InputError(f"batch: the keys {', '.join(given) or '(none)'} are of no format; expected {choices}")
    chosen = formats[own.index(max(own))]
    if chosen is _PAIRS:
        return preference_batch_from_dict(given, pad_token_id)
    check_keys(given, *chosen)
    read = Fields(given)
    return _from_rows(read, pad_token_id) if chosen is _ROWS else _from_groups(read, pad_token_id)


def _from_rows(read: Fields, pad_token_id: int) -> GivenCompletions:
    """Move the attended tokens together: the first is the prompt, the others are the response."""
    ids = read.ids("input_ids", "BL")
    if ids.shape[1] < 2:
        raise InputError(f"batch: 'input_ids' has the shape {list(ids.shape)}; expected [B, L] with L of 2 at least")
    attended = read.mask("attention_mask", "BL")
    if "old_log_probs" not in read and "behavior_log_probs" not in read:
        raise InputError(
            "batch: 'old_log_probs' is missing, and so is 'behavior_log_probs'; expected either, [B, L], the log-probs "
            "of the policy that sampled"
        )
    _check_tokens("attention_mask", attended, "row")
    check_ids("input_ids", ids, attended)
    sampled = attended & read.mask("response_mask", "BL") if "response_mask" in read else attended
    order = (~attended).long().argsort(dim=1, stable=True)
    mask = _cut(sampled.gather(1, order)[:, 1:])
    ids = ids.masked_fill(~attended, pad_token_id)

    def aligned(x: Tensor) -> Tensor:
        return x.gather(1, order)[:, 1 : 1 + mask.shape[1]]

    return GivenCompletions(
        prompt_ids=ids.gather(1, order)[:, :1],
        prompt_mask=attended.gather(1, order)[:, :1],
        response_ids=aligned(ids),
        response_mask=mask,
        group_ids=torch.arange(len(ids), device=ids.device),
        **_numbers(read, "BL", "B", aligned, mask),
    )


def _from_groups(read: Fields, pad_token_id: int) -> GivenCompletions:
    """One row per sample, its prompt repeated; padding goes to the left of prompts and to the right of responses."""
    prompts, responses = read.ids("prompt_ids", "BP"), read.ids("response_ids", "BGR").flatten(0, 1)
    sampled = read.mask("response_masks", "BGR").flatten(0, 1)
    masked = "prompt_masks" in read
    kept = read.mask("prompt_masks", "BP") if masked else _within(prompts == pad_token_id)
    _check_tokens("prompt_masks" if masked else "prompt_ids", kept, "prompt")
    check_ids("prompt_ids", prompts, kept)
    left = kept.long().argsort(dim=1, stable=True)
    prompts = prompts.masked_fill(~kept, pad_token_id).gather(1, left)
    read_or_sampled = sampled.flip(1).cumsum(1).flip(1) > 0
    check_ids("response_ids", responses, read_or_sampled)
    responses = responses.masked_fill(~read_or_sampled, pad_token_id)
    right = _leading((responses == pad_token_id) & ~sampled).long().argsort(dim=1, stable=True)
    mask = _cut(sampled.gather(1, right))
    G = len(responses) // len(prompts)

    def aligned(x: Tensor) -> Tensor:
        return x.flatten(0, 1).gather(1, right)[:, : mask.shape[1]]

    found = _numbers(read, "BGR", "BG", aligned, mask)
    if "greedy_rewards" in read:
        found["greedy_rewards"] = read.numbers("greedy_rewards", "B").repeat_interleave(G)
    return GivenCompletions(
        prompt_ids=prompts.repeat_interleave(G, 0),
        prompt_mask=kept.gather(1, left).repeat_interleave(G, 0),
        response_ids=responses.gather(1, right)[:, : mask.shape[1]],
        response_mask=mask,
        group_ids=torch.arange(len(prompts), device=prompts.device).repeat_interleave(G),
        **found,
    )


_NAMES = {  # key -> field
    "rewards": "rewards",
    "old_log_probs": "old_logprobs",
    "behavior_log_probs": "behavior_logprobs",
    "values": "values",
    "old_values": "old_values",
    "advantages": "advantages",
}
_PER_ROW_TOO = ("rewards", "behavior_log_probs", "advantages")


def _numbers(
    read: Fields, per_token: str, per_row: str, aligned: Callable[[Tensor], Tensor], mask: Tensor
) -> dict[str, Tensor]:
    """The fields that are there, `[N, T]` and zero outside the mask, or `[N]`."""
    found = {}
    for key, name in _NAMES.items():
        if key not in read:
            continue
        value = read.numbers(key, per_token, per_row) if key in _PER_ROW_TOO else read.numbers(key, per_token)
        if value.ndim == len(per_token):
            value = aligned(value)
            check_finite(key, value, mask)
            value = torch.where(mask, value, torch.zeros_like(value))
        else:
            value = value.flatten()
            check_finite(key, value)
            if key == "advantages":
                value = torch.where(mask, value.unsqueeze(1), torch.zeros_like(value).unsqueeze(1))
        found[name] = value
    return found


def _check_tokens(key: str, kept: Tensor, what: str) -> None:
    if not bool(kept.any(1).all()):
        row = int((~kept.any(1)).nonzero()[0])
        raise InputError(f"batch: {key!r} leaves no token of {what} {row}; expected one at least")


def _leading(cells: Tensor) -> Tensor:
    """The true cells `[N, T]` that only true ones stand before."""
    return cells.long().cumprod(1).bool()


def _within(padding: Tensor) -> Tensor:
    """All but the true cells at either end of a row."""
    return ~(_leading(padding) | _leading(padding.flip(1)).flip(1))


def _cut(mask: Tensor) -> Tensor:
    """Without the trailing columns that are true in no row, but for the first column."""
    used = mask.any(0).nonzero()
    return mask[:, : int(used.max()) + 1] if len(used) else mask[:, :1]

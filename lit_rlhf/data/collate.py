"""Rows of text to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from lit_rlhf.data.columns import check_margin
from lit_rlhf.data.encoding import Encoder
from lit_rlhf.types import CompletionBatch, PreferenceBatch, Row, pad_left, pad_right

EncodedPair: TypeAlias = tuple[list[int], list[int], list[int]]  # prompt, chosen and rejected completion


def collate_completions(
    encoder: Encoder, rows: Sequence[Row], pad_token_id: int, limit: int | None = None
) -> CompletionBatch:
    """Join the ids of `prompt` and `completion`, which ends with EOS once.

    Returns:
        N rows of at most `limit` tokens; prompts `[N, P]` left-padded, responses `[N, T]` right-padded.
    """
    prompts, completions = zip(*(encoder.row(row, ["completion"], limit) for row in rows), strict=True)
    return CompletionBatch(*pad_left(prompts, pad_token_id), *pad_right(completions, pad_token_id))


def encode_pair(encoder: Encoder, row: Row, limit: int | None = None) -> EncodedPair:
    """Token ids of a row's `prompt`, `chosen` and `rejected`, both completions with EOS at the end."""
    prompt, chosen, rejected = encoder.row(row, ["chosen", "rejected"], limit)
    return prompt, chosen, rejected


def stack_pairs(pairs: Sequence[EncodedPair], pad_token_id: int) -> PreferenceBatch:
    """N pairs; prompts `[N, P]` left-padded, completions `[N, T]` right-padded to one width."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    ids, mask = pad_right([*chosen, *rejected], pad_token_id)
    N = len(pairs)
    return PreferenceBatch(*pad_left(prompts, pad_token_id), ids[:N], mask[:N], ids[N:], mask[N:])


def collate_preferences(
    encoder: Encoder, rows: Sequence[Row], pad_token_id: int, limit: int | None = None
) -> PreferenceBatch:
    """Join the ids of `prompt` and `chosen`, and of `prompt` and `rejected`, which end with EOS once.

    Returns:
        N pairs of at most `limit` tokens each, see `stack_pairs`. Where rows have a finite number as their `margin`,
        `margin` `[N]` float32 holds it, and NaN for the rows that have none, or NaN.
    """
    batch = stack_pairs([encode_pair(encoder, row, limit) for row in rows], pad_token_id)
    margins = [row.get("margin") for row in rows]
    for margin in margins:
        check_margin(margin, "a row of pairs")
    if all(margin is None for margin in margins):
        return batch
    return replace(batch, margin=torch.tensor([float("nan") if margin is None else margin for margin in margins]))

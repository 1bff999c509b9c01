"""Rows of text to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from lit_rlhf.text import encode_completion, encode_prompt
from lit_rlhf.types import CompletionBatch, PreferenceBatch, Row, pad_left, pad_right

EncodedPair: TypeAlias = tuple[list[int], list[int], list[int]]  # prompt, chosen and rejected completion


def collate_completions(tokenizer: Any, rows: Sequence[Row]) -> CompletionBatch:
    """Encode `prompt` and `completion` apart, join their ids, and end every completion with EOS once.

    Returns:
        N rows; prompts `[N, P]` left-padded, responses `[N, T]` right-padded.
    """
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    completions = [encode_completion(tokenizer, row["completion"], tokenizer.eos_token_id) for row in rows]
    return CompletionBatch(*pad_left(prompts, tokenizer.pad_token_id), *pad_right(completions, tokenizer.pad_token_id))


def encode_pair(tokenizer: Any, row: Row) -> EncodedPair:
    """Token ids of a row's `prompt`, `chosen` and `rejected`, both completions with EOS at the end."""
    eos = tokenizer.eos_token_id
    chosen, rejected = (encode_completion(tokenizer, row[side], eos) for side in ("chosen", "rejected"))
    return encode_prompt(tokenizer, row["prompt"]), chosen, rejected


def stack_pairs(pairs: Sequence[EncodedPair], pad_token_id: int) -> PreferenceBatch:
    """N pairs; prompts `[N, P]` left-padded, completions `[N, T]` right-padded to one width."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    ids, mask = pad_right([*chosen, *rejected], pad_token_id)
    N = len(pairs)
    return PreferenceBatch(*pad_left(prompts, pad_token_id), ids[:N], mask[:N], ids[N:], mask[N:])


def collate_preferences(tokenizer: Any, rows: Sequence[Row]) -> PreferenceBatch:
    """Encode `prompt`, `chosen` and `rejected` apart, and end both completions with EOS once.

    Returns:
        N pairs, see `stack_pairs`. Where rows have a number as their `margin`, `margin` `[N]` float32 holds it, and NaN
        for the rows that have none.
    """
    batch = stack_pairs([encode_pair(tokenizer, row) for row in rows], tokenizer.pad_token_id)
    margins = [row.get("margin") for row in rows]
    if all(margin is None for margin in margins):
        return batch
    return replace(batch, margin=torch.tensor([float("nan") if margin is None else margin for margin in margins]))

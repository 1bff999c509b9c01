"""Rows of text to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_rlhf.data.rows import encode_completion, encode_prompt
from lit_rlhf.types import CompletionBatch, pad_left, pad_right


def collate_completions(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> CompletionBatch:
    """Encode `prompt` and `completion` apart, join their ids, and end every completion with EOS once.

    Returns:
        N rows; prompts `[N, P]` left-padded, responses `[N, T]` right-padded.
    """
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    completions = [encode_completion(tokenizer, row["completion"], tokenizer.eos_token_id) for row in rows]
    return CompletionBatch(*pad_left(prompts, tokenizer.pad_token_id), *pad_right(completions, tokenizer.pad_token_id))

"""The token ids of prompts and completions, which policies and reward models read alike."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from lit_rlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a prompt's token ids: BOS exactly once if the tokenizer adds one, and no EOS at the end.

    What the tokenizer puts before a text is kept and what it puts behind is not, since a completion
    follows. A BOS that the text already begins with, as chat templates write it, is not doubled.
    """
    plain: list[int] = tokenizer.encode(text, add_special_tokens=False)
    full: list[int] = tokenizer.encode(text, add_special_tokens=True)
    starts = range(len(full) - len(plain) + 1)
    prefix: list[int] = next((full[:i] for i in starts if full[i : i + len(plain)] == plain), [])
    ids = prefix + plain
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    return ids


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, eos_token_id: int | None = None) -> list[int]:
    """Return a completion's token ids: no BOS, and EOS exactly once at the end.

    They are appended to the ids of `encode_prompt`. The two texts are never tokenized as one: a token
    across their border would shift what is prompt and what is learned.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the completion; an EOS it already ends with is not doubled.
        eos_token_id: the tokenizer's own if not given.

    Raises:
        InputError: there is no EOS, so that a model could never learn to stop.
    """
    eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    if eos is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no EOS token, so that no "
            f"completion can end; set tokenizer.eos_token"
        )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    while ids[-1:] == [eos]:
        ids.pop()
    return [*ids, eos]


def with_own_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy that pads with another token than EOS where it does not, or with none."""
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id not in (None, eos):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    others = [i for i in tokenizer.all_special_ids if i != eos] or [i for i in range(len(tokenizer)) if i != eos]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0])
    return tokenizer

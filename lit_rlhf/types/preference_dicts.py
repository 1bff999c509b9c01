"""Preference pairs as plain dictionaries of whole sequences, without a border between prompt and completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.types.batches import PreferenceBatch, pad_left, pad_right
from lit_rlhf.types.dict_fields import Fields, check_finite, check_ids, check_keys, given_keys

_LAYOUTS = {"chosen": "BL", "rejected": "BR"}
REQUIRED = tuple(f"{side}_{part}" for side in _LAYOUTS for part in ("input_ids", "attention_mask"))
OPTIONAL = ("margin",)


def preference_batch_from_dict(
    batch: Mapping[str, Any], pad_token_id: int = 0, vocabulary: int | None = None
) -> PreferenceBatch:
    """Pairs `[B, L]` of prompt and completion in one sequence, padded on any side, as a `PreferenceBatch`.

    The prompt of a pair is what its two sequences begin with in common, so much of it that a token is left for the
    prompt and for either completion. Log-probs of a common beginning cancel in chosen minus rejected, and a reward is
    read at the last token, so the losses and their gradients are those of the true border; averages per token, as
    `DPO(kind="ipo")` takes them, count the tokens after the common beginning.

    Args:
        batch: `chosen_input_ids`, `chosen_attention_mask` `[B, L]` and `rejected_input_ids`,
            `rejected_attention_mask` `[B, R]`, the masks of 0 and 1; a finite `margin` `[B]` where the pairs have one.
        pad_token_id: what the padded cells of the result hold.
        vocabulary: token ids are below this number, where it is known.

    Raises:
        InputError: a key is unknown or missing, or its value is of the wrong type or shape or no token's id; the
            sentence names the key, what was given and what is expected.
    """
    given = given_keys(batch)
    check_keys(given, REQUIRED, OPTIONAL)
    read = Fields(given)
    chosen, rejected = (_sequences(read, side, vocabulary) for side in _LAYOUTS)
    margin = None
    if "margin" in read:
        margin = read.numbers("margin", "B")
        check_finite("margin", margin)
    pairs = [_split(w, r, row) for row, (w, r) in enumerate(zip(chosen, rejected, strict=True))]
    prompt_ids, prompt_mask = pad_left([prompt for prompt, _, _ in pairs], pad_token_id)
    ids, mask = pad_right([w for _, w, _ in pairs] + [r for _, _, r in pairs], pad_token_id)
    N = len(pairs)
    typed = PreferenceBatch(prompt_ids, prompt_mask, ids[:N], mask[:N], ids[N:], mask[N:], margin=margin)
    return typed.to(read.ids("chosen_input_ids", "BL").device)


def _sequences(read: Fields, side: str, vocabulary: int | None) -> list[list[int]]:
    """The attended tokens of every row."""
    ids = read.ids(f"{side}_input_ids", _LAYOUTS[side])
    mask = read.mask(f"{side}_attention_mask", _LAYOUTS[side]).to(ids.device)
    check_ids(f"{side}_input_ids", ids, mask, vocabulary)
    rows: list[list[int]] = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    for row, tokens in enumerate(rows):
        if len(tokens) < 2:
            raise InputError(
                f"batch: '{side}_attention_mask' leaves {len(tokens)} tokens of row {row}; expected 2 at least, one of "
                "the prompt and one of the completion"
            )
    return rows


def _split(chosen: list[int], rejected: list[int], row: int) -> tuple[list[int], list[int], list[int]]:
    longest = min(len(chosen), len(rejected)) - 1
    border = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    if not border:
        raise InputError(
            f"batch: 'chosen_input_ids' and 'rejected_input_ids' of row {row} begin with different tokens, "
            f"{chosen[0]} and {rejected[0]}; expected completions of one prompt, which both begin with"
        )
    return chosen[:border], chosen[border:], rejected[border:]

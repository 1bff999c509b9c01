"""Preference pairs as plain dictionaries of whole sequences, without a border between prompt and completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.types.batches import PreferenceBatch, pad_left, pad_right

_SIDES = ("chosen", "rejected")
_KEYS = tuple(f"{side}_{part}" for side in _SIDES for part in ("input_ids", "attention_mask"))


def preference_batch_from_dict(batch: Mapping[str, Any], pad_token_id: int = 0) -> PreferenceBatch:
    """Pairs `[B, L]` of prompt and completion in one sequence, padded on any side, as a `PreferenceBatch`.

    The prompt of a pair is what its two sequences begin with in common, so much of it that a token is left for the
    prompt and for either completion. Log-probs of a common beginning cancel in chosen minus rejected, and a reward is
    read at the last token, so the losses and their gradients are those of the true border; averages per token, as
    `DPO(kind="ipo")` takes them, count the tokens after the common beginning.

    Args:
        batch: `chosen_input_ids`, `chosen_attention_mask` `[B, L]` and `rejected_input_ids`,
            `rejected_attention_mask` `[B, L']`; a `margin` `[B]` where the pairs have one. Other keys are left alone.
        pad_token_id: what the padded cells of the result hold.

    Raises:
        InputError: names the key that is missing or misshapen, what was given and what is expected.
    """
    found = {key: _matrix(batch, key) for key in _KEYS}
    for side in _SIDES:
        ids, mask = found[f"{side}_input_ids"], found[f"{side}_attention_mask"]
        if mask.shape != ids.shape:
            raise _misfit(f"{side}_attention_mask", mask, f"the shape of {side}_input_ids, {list(ids.shape)}")
    count = len(found["chosen_input_ids"])
    if len(found["rejected_input_ids"]) != count:
        raise _misfit("rejected_input_ids", found["rejected_input_ids"], f"as many rows as chosen_input_ids, {count}")
    pairs = [_split(_sequence(found, "chosen", row), _sequence(found, "rejected", row), row) for row in range(count)]
    prompt_ids, prompt_mask = pad_left([prompt for prompt, _, _ in pairs], pad_token_id)
    ids, mask = pad_right([c for _, c, _ in pairs] + [r for _, _, r in pairs], pad_token_id)
    typed = PreferenceBatch(
        prompt_ids, prompt_mask, ids[:count], mask[:count], ids[count:], mask[count:], margin=_margin(batch, count)
    )
    return typed.to(found["chosen_input_ids"].device)


def _matrix(batch: Mapping[str, Any], key: str) -> Tensor:
    if key not in batch:
        given = ", ".join(sorted(map(str, batch))) or "nothing"
        raise InputError(f"batch: {key!r} is missing, given are {given}; expected {', '.join(_KEYS)}, each [B, L]")
    value = _tensor(key, batch[key])
    if value.ndim != 2 or not len(value):
        raise _misfit(key, value, "[B, L] with a row at least")
    if key.endswith("ids") and (value.is_floating_point() or value.dtype == torch.bool):
        raise InputError(
            f"batch: {key!r} holds {str(value.dtype).removeprefix('torch.')}; expected token ids, integers"
        )
    return value


def _tensor(key: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"batch: {key!r} is no tensor but a {type(value).__name__} ({error}); expected one") from error


def _margin(batch: Mapping[str, Any], count: int) -> Tensor | None:
    if batch.get("margin") is None:
        return None
    margin = _tensor("margin", batch["margin"])
    if margin.shape != (count,):
        raise _misfit("margin", margin, f"[{count}], a number per pair")
    return margin.float() if not margin.is_floating_point() else margin


def _misfit(key: str, value: Tensor, expected: str) -> InputError:
    return InputError(f"batch: {key!r} has the shape {list(value.shape)}; expected {expected}")


def _sequence(found: Mapping[str, Tensor], side: str, row: int) -> list[int]:
    tokens: list[int] = found[f"{side}_input_ids"][row][found[f"{side}_attention_mask"][row] > 0].tolist()
    if len(tokens) < 2:
        raise InputError(
            f"batch: '{side}_attention_mask' leaves {len(tokens)} tokens of row {row}; expected 2 at least, one of the "
            "prompt and one of the completion"
        )
    return tokens


def _split(chosen: list[int], rejected: list[int], row: int) -> tuple[list[int], list[int], list[int]]:
    longest = min(len(chosen), len(rejected)) - 1
    border = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    if not border:
        raise InputError(
            f"batch: 'chosen_input_ids' and 'rejected_input_ids' of row {row} begin with different tokens, "
            f"{chosen[0]} and {rejected[0]}; expected completions of one prompt, which both begin with"
        )
    return chosen[:border], chosen[border:], rejected[border:]

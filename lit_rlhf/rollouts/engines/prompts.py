"""What every engine does with the prompts it is given: checks, padding, a seed for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import max_positions
from lit_rlhf.rollouts.random import mix_seed
from lit_rlhf.types import pad_left


def checked_prompts(
    model: Any, prompt_ids: Sequence[Sequence[int]], new_tokens: int, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Left-padded prompts `[B, P]` and their mask.

    Raises:
        InputError: there are none, one is empty, does not fit the model, or has a token id outside its vocabulary.
    """
    if len(prompt_ids) == 0:
        raise InputError("there are no prompts to sample for: give at least one")
    if empty := [i for i, prompt in enumerate(prompt_ids) if len(prompt) == 0]:
        raise InputError(f"prompt {empty[0]} is empty: every prompt needs at least one token")
    ids, mask = pad_left(prompt_ids, pad_token_id)
    longest, vocabulary = ids.shape[1], model.get_input_embeddings().num_embeddings
    limit = max_positions(model)
    if limit is not None and longest + new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens with max_new_tokens={new_tokens} exceeds the model's limit of {limit} "
            "positions: shorten the prompt or lower max_new_tokens"
        )
    outside = ((ids < 0) | (ids >= vocabulary)).nonzero().tolist()
    if outside:
        row, column = outside[0]
        where = f"prompt {row}" if mask[row, column] else "the padding (pad_token_id)"
        raise InputError(
            f"token id {int(ids[row, column])} in {where} is outside the model's vocabulary of {vocabulary}: "
            "use the model's own tokenizer, or resize the model's embeddings"
        )
    return ids, mask


def seed_per_prompt(seed: int | Sequence[int], prompts: int) -> list[int]:
    """One seed for each of so many prompts, see `RolloutEngine.generate`."""
    if isinstance(seed, int):
        return [mix_seed(seed, i) for i in range(prompts)]
    if len(seed) != prompts:
        raise InputError(f"got {len(seed)} seeds for {prompts} prompts: give one per prompt, or one integer")
    return list(seed)

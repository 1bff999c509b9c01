"""Completions of a user's own, for the on-policy algorithms: what is not given is filled in by the models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lit_rlhf.errors import InputError
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.models.loading import vocabulary_size
from lit_rlhf.types import Experience, GivenCompletions, PreferenceBatch, ScoredRollout, from_dict

if TYPE_CHECKING:
    from lit_rlhf.algorithms.on_policy import OnPolicyModule


def read_completions(module: OnPolicyModule, batch: Mapping[str, Any]) -> GivenCompletions:
    """The dictionary's completions on the module's device.

    Raises:
        InputError: the dictionary is in no format of `types.from_dict`, or not in one that this algorithm learns from.
    """
    given = from_dict(batch, module.tokenizer.pad_token_id)
    name = type(module).__name__
    if isinstance(given, PreferenceBatch):
        raise InputError(f"batch: {name} learns from rewards and 'chosen_input_ids' are of pairs; train DPO on them")
    alone = len(torch.unique(given.group_ids)) == len(given.group_ids)
    if alone and given.advantages is None and module.compares_within_groups:
        raise InputError(
            f"batch: {name} compares the samples of one prompt with each other and there is one per prompt; expected "
            "'prompt_ids' [B, P] and 'response_ids' [B, G, R] with G of 2 at least, or 'advantages'"
        )
    if given.behavior_logprobs is not None and module.importance.level == "auto":
        raise InputError(
            f"batch: {name} corrects by 'behavior_log_probs' with algo.importance_correction=token or sequence only; "
            "expected that, or 'old_log_probs' alone"
        )
    size = vocabulary_size(module.models.policy)
    highest = int(torch.cat([given.prompt_ids, given.response_ids], 1).max())
    if highest >= size:
        raise InputError(f"batch: token id {highest} is given; expected ids below {size}, the size of the vocabulary")
    return given.to(module.device)


def score_given(module: OnPolicyModule, given: GivenCompletions) -> ScoredRollout:
    """The completions with all that an update starts from. None counts as cut off or as sampled by older weights."""
    models, temperature = module.models, module.sampling.temperature
    old, values, rewards = given.old_logprobs, given.values, given.rewards
    if old is None:
        old = models.score(given, temperature=temperature).logprobs
    if values is None and models.value_head is not None:
        values = models.score_values(given).values
    ref = models.score_reference(given, temperature=temperature).logprobs if models.has_reference else None
    raw = rewards if rewards.ndim == 1 else zero_outside(rewards, given.response_mask).sum(1)
    return ScoredRollout(
        prompt_ids=given.prompt_ids,
        prompt_mask=given.prompt_mask,
        response_ids=given.response_ids,
        response_mask=given.response_mask,
        behavior_logprobs=old if given.behavior_logprobs is None else given.behavior_logprobs,
        truncated=torch.zeros_like(given.group_ids, dtype=torch.bool),
        group_ids=given.group_ids,
        version=torch.full_like(given.group_ids, module.loop.iteration),
        raw_rewards=raw,
        reward_parts=raw.unsqueeze(1),
        rewards=rewards,
        old_logprobs=old,
        ref_logprobs=ref,
        values=values,
        baseline=given.greedy_rewards,
    )


def with_given(experience: Experience, given: GivenCompletions) -> Experience:
    """The experience with the advantages, and the centre of the value clip, that were given."""
    if given.advantages is not None:
        experience = replace(experience, advantages=given.advantages)
    return experience if given.old_values is None else replace(experience, values=given.old_values)

"""Prompts in, scored completions out: the engine samples, the reward functions judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import end_tokens
from lit_rlhf.models.wrapper import PolicyReferenceValue
from lit_rlhf.ranks import sum_over_ranks
from lit_rlhf.rewards import Judges, RewardFunctions
from lit_rlhf.rollouts.engines import EngineFactory, RolloutEngine, TransformersEngine
from lit_rlhf.rollouts.random import mix_seed
from lit_rlhf.types import PromptBatch, Rollout, SamplingConfig, ScoredRollout

TRAINING, VALIDATION, OPPONENT = 0, 1, 2  # stages with random numbers of their own
NO_REWARDS = "no reward function: give reward_funcs=[...] (on the command line reward.funcs=[my_file.my_function])"


@torch.no_grad()
def sample_and_score(
    engine: RolloutEngine,
    tokenizer: Any,
    rewards: RewardFunctions | Judges | None,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    *seed: int,
) -> ScoredRollout:
    """Sample `sampling.group_size` completions of each prompt and score them.

    Args:
        engine: what samples, with the weights it was given last.
        tokenizer: decodes the completions for the reward functions.
        rewards: the reward functions.
        prompts: B prompts; their stream positions become the group ids and seed their random numbers.
        sampling: how; N = B * group_size rows come back.
        *seed: integers that the random numbers depend on, beside the prompt's position.

    Raises:
        InputError: there is no reward function, or one returned something that is no reward.
    """
    if not rewards:
        raise InputError(NO_REWARDS)
    rollout = engine.generate(prompts.prompt_ids, sampling, prompt_seeds(prompts, *seed))
    return scored(tokenizer, rewards, prompts, rollout, sampling.group_size)


def prompt_seeds(prompts: PromptBatch, *seed: int) -> list[int]:
    """One seed per prompt, which depends on its stream position and on the integers given."""
    return [mix_seed(*seed, i) for i in prompts.index]


@torch.no_grad()
def scored(
    tokenizer: Any, rewards: RewardFunctions | Judges | None, prompts: PromptBatch, rollout: Rollout, group_size: int
) -> ScoredRollout:
    """The samples of `prompts`, scored by the reward functions; `sample_and_score` without the sampling."""
    if not rewards:
        raise InputError(NO_REWARDS)
    total, parts = score_texts(rewards, tokenizer, prompts, rollout, group_size)
    group_ids = torch.tensor(prompts.index, device=total.device).repeat_interleave(group_size)
    kept = {f.name: getattr(rollout, f.name) for f in fields(Rollout)} | {"group_ids": group_ids}
    return ScoredRollout(
        **kept, raw_rewards=total, reward_parts=parts, rewards=total, old_logprobs=rollout.behavior_logprobs
    )


@torch.no_grad()
def start_of_update(
    models: PolicyReferenceValue, rollout: ScoredRollout, temperature: float, rescore: Tensor, bootstrap: bool
) -> ScoredRollout:
    """Add what an update starts from: the policy's log-probs, the reference's, the values.

    Args:
        models: policy, and reference and value function where there are any.
        rollout: N rows; `old_logprobs` are the sampler's so far.
        temperature: the sampling temperature.
        rescore: `[N]` bool, rows whose `old_logprobs` the policy has to score again. Where one rank has such rows all
            score theirs, since a sharded forward pass is a collective.
        bootstrap: whether rows that were cut off go on to earn their last value.
    """
    old, ref = rollout.old_logprobs, None
    if bool(sum_over_ranks(rescore.sum())):
        now = models.score(rollout, temperature=temperature).logprobs
        old = torch.where(rescore.unsqueeze(1), now.to(old.dtype), old)
    if models.has_reference:
        ref = models.score_reference(rollout, temperature=temperature).logprobs
    rollout = replace(rollout, old_logprobs=old, ref_logprobs=ref)
    if models.value_head is None:
        return rollout
    found = models.score_values(rollout)
    last = torch.where(rollout.truncated & bootstrap, found.last, 0.0)
    return replace(rollout, values=found.values, bootstrap=last)


def score_texts(
    rewards: RewardFunctions | Judges, tokenizer: Any, prompts: PromptBatch, rollout: Rollout, group_size: int
) -> tuple[Tensor, Tensor]:
    """Weighted sum `[N]` and single rewards `[N, F]`, on the rollout's device."""
    columns = {name: [v for v in values for _ in range(group_size)] for name, values in prompts.columns.items()}
    prompt_texts = columns.pop("prompt")
    device = rollout.response_ids.device
    total, parts = rewards.to(device)(prompt_texts, decode(tokenizer, rollout), sampled_ids(rollout), columns)
    return total.to(device), parts.to(device)


def decode(tokenizer: Any, rollout: Rollout) -> list[str]:
    """The completions as texts, without special tokens."""
    texts: list[str] = tokenizer.batch_decode(sampled_ids(rollout), skip_special_tokens=True)
    return texts


def sampled_ids(rollout: Rollout) -> list[list[int]]:
    """The token ids of each completion, without padding."""
    masks = rollout.response_mask.cpu()
    return [row[mask].tolist() for row, mask in zip(rollout.response_ids.cpu(), masks, strict=True)]


def engine_for(
    policy: nn.Module,
    tokenizer: Any,
    stop: Sequence[str],
    engine: RolloutEngine | EngineFactory = TransformersEngine,
) -> RolloutEngine:
    """The engine, or the one made so that completions end at the tokenizer's and the model's EOS and at `stop`.

    Raises:
        InputError: a stop string is not a single token.
    """
    if isinstance(engine, RolloutEngine) and not isinstance(engine, type):
        return engine
    make = cast(EngineFactory, engine)
    return make(end_token_ids(policy, tokenizer, stop), tokenizer.pad_token_id)


def end_token_ids(policy: nn.Module, tokenizer: Any, stop: Sequence[str]) -> list[int]:
    """The tokens that completions end at: the tokenizer's and the model's EOS and the `stop` strings.

    Raises:
        InputError: a stop string is not a single token.
    """
    return sorted({*end_tokens(policy, tokenizer), *(_single_token(tokenizer, text) for text in stop)})


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(f"rollout.stop: {text!r} is {len(ids)} tokens of this tokenizer; give a single token")
    return int(ids[0])

"""Log-probs of pi_old, the policy at the start of the update phase: the sampler's own, or scored again, or neither.

The sampler's are those of the policy where the weights are the same, the distribution is not cut off by top-p or top-k,
and both compute in float32 by the same code. Rows of which that is not so are scored again. Where the rollout is one
optimiser step that takes no forward pass of its own: pi_old is the policy that the step's forward pass scores.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf.models.scoring import Scores
from lit_rlhf.rollouts.engines import has_exact_logprobs
from lit_rlhf.types import Experience, ScoredRollout

if TYPE_CHECKING:
    from lit_rlhf.algorithms.on_policy import OnPolicyModule


def to_score_again(module: OnPolicyModule, version: Tensor) -> Tensor:
    """Rows `[N]` bool whose sampler's log-probs are not those of the policy now.

    The age of rows that older weights sampled is then for `importance_correction` to weigh; without it they are taken
    for on-policy.
    """
    again = (version < module.loop.iteration) & (module.importance.level != "none")
    truncated = module.sampling.truncates_distribution
    if truncated or not module._full_precision or not has_exact_logprobs(module.engine):
        again = torch.ones_like(again)
    return again


def is_found_in_update(module: OnPolicyModule) -> bool:
    """Whether pi_old is what the update's forward pass scores, and nothing asks for it before.

    The KL in the reward does, and what a user has written may, or who calls `collect` by hand.
    """
    kind = type(module)
    collecting = (kind.collect, kind.score_rollout, kind.experience, kind.shape_rewards, kind.compute_advantages)
    named = inspect.signature(module._estimate).parameters
    asked = module.prompts is None or module.kl.in_reward or module.kl.target is not None or "old_logprobs" in named
    asked |= any(p.kind is p.VAR_KEYWORD for p in named.values())
    ours = all(hook.__module__.startswith("lit_rlhf.") for hook in (*collecting, kind.training_step))
    return module.minibatches == 1 and module.update_epochs == 1 and ours and not asked


def not_scored_yet(rollout: ScoredRollout, rows: Tensor) -> ScoredRollout:
    """The rollout with the `old_logprobs` of these rows, `[N]` bool, left to the update: no numbers until then."""
    old = rollout.old_logprobs.masked_fill(rows.unsqueeze(1), torch.nan)
    return replace(rollout, unscored=rows, old_logprobs=old)


def with_found(batch: Experience, scores: Scores) -> Experience:
    """The batch with the `old_logprobs` that were left to the update, which are those it has just scored."""
    if batch.unscored is None:
        return batch
    now = scores.logprobs.detach().to(batch.old_logprobs.dtype)
    return replace(batch, old_logprobs=torch.where(batch.unscored.unsqueeze(1), now, batch.old_logprobs))

"""ReMax (Li et al., arXiv 2310.10505, algorithm 2).

    grad J = E[ (R(o) - R(o_greedy)) sum_t grad log pi_theta(o_t | q, o_<t) ]

The baseline is the reward of the greedy completion of the same prompt by the same weights: one more completion per
prompt instead of a critic, and unbiased, since it does not depend on the sample. With a KL in the reward the baseline
is the greedy completion's raw score. The loss sums over tokens; the constant 1/max_new_tokens only sets its scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule
from lit_rlhf.errors import InputError
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.types import PromptBatch, ScoredRollout


class ReMax(OnPolicyModule):
    """The score function with the greedy completion's reward as the baseline.

    Choose it when only one sample per prompt can be afforded: the greedy one is the only other.

    Example:
        module = ReMax(policy="tiny", group_size=1)

    Args:
        kl_coef: beta, weight of the KL in the reward.
        loss_agg: `"seq-mean-token-sum"`, or the same over a constant length.
        **on_policy: the arguments of `OnPolicyModule`; `group_size` may be 1.
    """

    advantage_estimator = "rewards_to_go"
    policy_loss = "reinforce"
    kl_in = "reward"
    stats_spec: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **OnPolicyModule.stats_spec,
        "reward/greedy_reward": ("value",),
    }

    def __init__(
        self,
        *,
        kl_coef: float = 0.0,
        loss_agg: LossAggregation = "seq-mean-token-sum-norm",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)

    def gather(self, prompts: PromptBatch) -> ScoredRollout:
        """The samples, each with the reward of its prompt's greedy completion."""
        rollout = self.sample_recorded(prompts)
        greedy = self.sample(prompts, replace(self.sampling, temperature=0.0, group_size=1))
        self.count({"reward/greedy_reward": (greedy.raw_rewards, ~greedy.raw_rewards.isnan())})
        return replace(rollout, baseline=greedy.raw_rewards.repeat_interleave(self.group_size))

    def compute_advantages(self, rollout: ScoredRollout) -> tuple[Tensor, Tensor | None]:
        """Rewards to go minus the greedy completion's reward; 0 where either could not be scored.

        Raises:
            InputError: a dictionary of given completions has no `greedy_rewards`.
        """
        returns, _ = super().compute_advantages(rollout)
        if rollout.baseline is None:
            raise InputError(
                "batch: 'greedy_rewards' is missing; ReMax needs a greedy completion's reward per prompt, [B]"
            )
        known = ~(rollout.raw_rewards.isnan() | rollout.baseline.isnan()).unsqueeze(1)
        baseline = torch.where(rollout.baseline.isnan(), 0.0, rollout.baseline).unsqueeze(1)
        return zero_outside(returns - baseline, rollout.response_mask & known), returns

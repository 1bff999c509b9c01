"""REINFORCE with a moving-average baseline (Williams 1992).

    grad J = E[ sum_t (G_t - b) grad log pi_theta(o_t | q, o_<t) ],      G_t = sum_{s >= t} gamma^(s-t) r_s
    b_k = a b_{k-1} + (1 - a) mean R_k,     used as b_{k-1} / (1 - a^(k-1)), and 0 before the first rollout

Any baseline that does not depend on the current sample leaves the gradient unbiased, so the average is used as it was
before this rollout and moved afterwards, by the mean over all ranks; it is part of the checkpoint. The loss sums
over tokens; the constant 1/max_new_tokens only sets its scale.
"""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule
from lit_rlhf.errors import InputError
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.ranks import mean_over_ranks, sum_over_ranks
from lit_rlhf.types import ScoredRollout


class REINFORCE(OnPolicyModule):
    """The score function with rewards to go and a running mean of the returns as the baseline.

    Choose it as the simple baseline to compare others with.

    Example:
        module = REINFORCE(policy="tiny", baseline_decay=0.9)

    Args:
        baseline_decay: a; 0 uses the last rollout's mean, and with 1 there is no baseline.
        gamma: discount per token; 1 for language models, where the reward comes last.
        kl_coef: beta, weight of the KL in the reward.
        loss_agg: `"seq-mean-token-sum"`, or the same over a constant length.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "rewards_to_go"
    policy_loss = "reinforce"
    kl_in = "reward"
    hyper_parameters = ("gamma",)

    def __init__(
        self,
        *,
        baseline_decay: float = 0.99,
        gamma: float = 1.0,
        kl_coef: float = 0.0,
        loss_agg: LossAggregation = "seq-mean-token-sum-norm",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        self.baseline_decay, self.gamma = baseline_decay, gamma
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)
        if not 0 <= baseline_decay <= 1:
            raise InputError(f"algo.baseline_decay must be from 0 to 1, got {baseline_decay}")

    @property
    def baseline(self) -> float:
        """b, bias-corrected; 0 before the first rollout."""
        average, rollouts = (self.loop.numbers.get(f"baseline_{name}", 0.0) for name in ("average", "rollouts"))
        correction = 1 - self.baseline_decay**rollouts
        return average / correction if correction else 0.0

    def compute_advantages(self, rollout: ScoredRollout) -> tuple[Tensor, Tensor | None]:
        """Rewards to go minus the baseline, which then moves towards this rollout's mean return."""
        returns, _ = super().compute_advantages(rollout)
        scored = rollout.response_mask & ~rollout.raw_rewards.isnan().unsqueeze(1)
        advantages = zero_outside(returns - self.baseline, scored)
        first = returns.gather(1, rollout.response_mask.float().argmax(1, keepdim=True)).squeeze(1)  # of the whole row
        counted = scored.any(1)
        mean, completions = float(mean_over_ranks(first, counted)), int(sum_over_ranks(counted.sum()))
        if completions and math.isfinite(mean):  # a rollout without a single reward says nothing
            a, numbers = self.baseline_decay, self.loop.numbers
            numbers["baseline_average"] = a * numbers.get("baseline_average", 0.0) + (1 - a) * mean
            numbers["baseline_rollouts"] = numbers.get("baseline_rollouts", 0.0) + 1
        return advantages, returns

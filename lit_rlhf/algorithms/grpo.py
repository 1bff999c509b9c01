"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, eq. 3; R1, arXiv 2501.12948).

    J = E[ 1/G sum_i 1/|o_i| sum_t { min(r_it A_i, clip(r_it, 1-eps, 1+eps) A_i) - beta KL_it } ]
    r_it = pi_theta(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)
    A_i  = (R_i - mean_g R) / (std_g R + 1e-4)
    KL_it = pi_ref/pi_theta - log(pi_ref/pi_theta) - 1                      (k3, Schulman)

Departures from the paper: beta = 0 by default, so no reference model is held (the paper has 0.04, R1 0.001);
the standard deviation is unbiased and a group of equal rewards has advantage exactly 0.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule
from lit_rlhf.errors import check_choice


class GRPO(OnPolicyModule):
    """Group-relative advantages, the clipped objective, the mean over each completion, then over completions.

    Choose it to start with, wherever several completions per prompt can be sampled: no value function to train.

    Example:
        module = GRPO(policy="tiny", group_size=16, kl_coef=0.01)

    Args:
        clip_ratio_low: eps below 1.
        clip_ratio_high: eps above 1.
        kl_coef: beta, weight of the KL term; with 0 no reference model is held.
        scale_rewards: divide by the group's standard deviation (`"std"`), the batch's (`"batch"`) or nothing.
        loss_agg: the paper's 1/|o_i| average is `"seq-mean-token-mean"`.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "group_normalize"
    policy_loss = "clip"
    hyper_parameters = ("clip_ratio_low", "clip_ratio_high", "scale_rewards")

    def __init__(
        self,
        *,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.2,
        scale_rewards: Literal["std", "none", "batch"] = "std",
        kl_coef: float = 0.0,
        loss_agg: LossAggregation = "seq-mean-token-mean",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        self.clip_ratio_low, self.clip_ratio_high, self.scale_rewards = clip_ratio_low, clip_ratio_high, scale_rewards
        check_choice("algo.scale_rewards", scale_rewards, ("std", "none", "batch"))
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)

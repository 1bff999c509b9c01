"""Dr. GRPO: GRPO Done Right (arXiv 2503.20783, section 3.2).

    J = E[ 1/N sum_i 1/L_max sum_t min(r_it A_i, clip(r_it, 1-eps, 1+eps) A_i) ],      A_i = R_i - mean_g R

Two biases of GRPO taken out: the division by the completion's own length, which favours short right and long wrong
answers, and by the group's standard deviation, which favours prompts that are nearly always or never solved.
L_max is the constant `max_new_tokens`. The expected gradient is (G-1)/G times the true one over L_max.
"""

from __future__ import annotations

from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule


class DrGRPO(OnPolicyModule):
    """Group mean as the baseline, nothing divided by a length or a deviation of the sample.

    Choose it when completions grow without getting better.

    Example:
        module = DrGRPO(policy="tiny", group_size=16)

    Args:
        clip_ratio_low: eps below 1.
        clip_ratio_high: eps above 1.
        kl_coef: beta, weight of a KL term; the paper has none.
        loss_agg: the paper's sum over tokens by a constant is `"seq-mean-token-sum-norm"`.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "group_normalize"
    policy_loss = "clip"
    scale_rewards = "none"
    hyper_parameters = ("clip_ratio_low", "clip_ratio_high", "scale_rewards")

    def __init__(
        self,
        *,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.2,
        kl_coef: float = 0.0,
        loss_agg: LossAggregation = "seq-mean-token-sum-norm",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        self.clip_ratio_low, self.clip_ratio_high = clip_ratio_low, clip_ratio_high
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)

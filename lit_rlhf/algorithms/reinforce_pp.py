"""REINFORCE++ (Hu et al., arXiv 2501.03262), and its variant with a group baseline.

    r_t = 1[t = T] R - beta log( pi_old(o_t) / pi_ref(o_t) ),    G_t = sum_{s >= t} r_s,    A_t = (G_t - mean G) / std G
    L   = -mean_it min( r_it A_it, clip(r_it, 1-eps, 1+eps) A_it )

Mean and deviation are over all tokens of the global batch: PPO without a critic, and without groups. The variant,
`group_baseline=True`, takes the group's mean off first (A_i = R_i - mean_g R, then the same whitening, no
deviation of the group) and has the KL in the loss, by k2, instead of in the reward. The deviation is unbiased.
"""

from __future__ import annotations

from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule


class REINFORCEPlusPlus(OnPolicyModule):
    """Globally whitened rewards to go and PPO's clip.

    Choose it when there is neither memory for a critic nor more than one sample per prompt.

    Example:
        module = REINFORCEPlusPlus(policy="tiny", group_size=1)

    Args:
        group_baseline: the `-baseline` variant, for several samples per prompt.
        gamma: discount per token.
        clip_ratio_low: eps below 1.
        clip_ratio_high: eps above 1.
        kl_coef: beta; by default in the reward by k1, in the variant in the loss by k2.
        loss_agg: `"token-mean"`, as in OpenRLHF.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "rewards_to_go"
    policy_loss = "clip"
    kl_in = "reward"
    whiten_advantages = True
    scale_rewards = "none"
    hyper_parameters = ("gamma", "clip_ratio_low", "clip_ratio_high", "scale_rewards")

    def __init__(
        self,
        *,
        group_baseline: bool = False,
        gamma: float = 1.0,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.2,
        kl_coef: float = 0.01,
        loss_agg: LossAggregation = "token-mean",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        self.gamma, self.clip_ratio_low, self.clip_ratio_high = gamma, clip_ratio_low, clip_ratio_high
        if group_baseline:
            on_policy["advantage_estimator"] = on_policy.get("advantage_estimator") or "group_normalize"
        if group_baseline and kl_coef:
            place = on_policy.get("kl_in") or "loss"  # in the reward k1 is the one whose gradient is the KL's
            estimator = "k2" if place == "loss" else None
            on_policy["kl_in"], on_policy["kl_estimator"] = place, on_policy.get("kl_estimator") or estimator
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)

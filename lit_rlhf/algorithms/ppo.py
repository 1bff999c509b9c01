"""PPO: Proximal Policy Optimization (Schulman et al., arXiv 1707.06347; for language models 2203.02155, 2403.17031).

    L     = L_pg + c_v L_v - c_e H
    L_pg  = -mean_t min( r_t A_t, clip(r_t, 1-eps_low, 1+eps_high) A_t ),     r_t = pi_theta(o_t) / pi_old(o_t)
    L_v   = 1/2 mean_t max( (V_t - ret_t)^2, (clip(V_t, V_old -+ eps_v) - ret_t)^2 )
    A_t   = sum_l (gamma lambda)^l delta_{t+l},   delta_t = r_t + gamma V_{t+1} - V_t,   ret_t = A_t + V_t     (GAE)
    r_t   = 1[t = T] R - beta log( pi_old(o_t) / pi_ref(o_t) )

Advantages are whitened over the rollout's tokens, returns are not. gamma = 1: at 0.99 a reward at the end of 512
tokens would be worth 0.006 at their beginning. The dual clip (arXiv 1912.09729) is off unless given.
"""

from __future__ import annotations

from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule
from lit_rlhf.errors import check_number


class PPO(OnPolicyModule):
    """Clipped policy and value losses on generalised advantages, with the KL to the reference in the reward.

    Choose it for the steadiest updates, or for rewards per token: its value function tells tokens apart.

    Example:
        module = PPO(policy="tiny", gae_lambda=0.9, kl_target=0.1)

    Args:
        gamma: discount per token.
        gae_lambda: lambda; 0 trusts the value function, 1 the returns.
        clip_ratio_low: eps_low.
        clip_ratio_high: eps_high.
        dual_clip: c > 1 bounds the loss of a negative advantage at c |A|; verl has 3.
        kl_coef: beta (TRL's 0.05), in the reward unless `kl_in="loss"`; adaptive with `kl_target`.
        loss_agg: the average over all tokens of the step is `"token-mean"`.
        **on_policy: the arguments of `OnPolicyModule`: `value`, `value_coef` (c_v), `value_clip` (eps_v),
            `entropy_coef` (c_e), `update_epochs`, `target_kl` and the rest.
    """

    advantage_estimator = "gae"
    policy_loss = "clip"
    value = "separate"
    kl_in = "reward"
    whiten_advantages = True
    update_epochs = 4
    hyper_parameters = ("gamma", "gae_lambda", "clip_ratio_low", "clip_ratio_high", "dual_clip")

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.2,
        dual_clip: float | None = None,
        kl_coef: float = 0.05,
        loss_agg: LossAggregation = "token-mean",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        self.gamma, self.gae_lambda, self.dual_clip = gamma, gae_lambda, dual_clip
        self.clip_ratio_low, self.clip_ratio_high = clip_ratio_low, clip_ratio_high
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)
        check_number("algo.dual_clip", 2.0 if dual_clip is None else dual_clip, above=1)

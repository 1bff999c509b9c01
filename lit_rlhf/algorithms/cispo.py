"""CISPO: Clipped Importance Sampling Policy Optimization (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    J = E[ 1/sum_i|o_i| sum_i sum_t sg(clip(r_it, clip_min, clip_max)) A_i log pi_theta(o_it | q, o_i<t) ]
    A_i = (R_i - mean_g R) / std_g R

The weight is clipped and not the update: rare tokens whose ratio grows fast ("However", "Wait") keep their gradient.
The bounds are absolute, as in TRL, and not 1 -+ eps; the paper tunes the upper one alone.
"""

from __future__ import annotations

from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule
from lit_rlhf.errors import InputError, check_number


class CISPO(OnPolicyModule):
    """REINFORCE with group-relative advantages and a clipped, detached importance weight per token.

    Choose it for several updates per rollout: no token loses its gradient to a clip.

    Example:
        module = CISPO(policy="tiny", minibatches=4, clip_max=3.0)

    Args:
        clip_min: least weight of a token.
        clip_max: greatest weight of a token.
        kl_coef: beta, weight of a KL term; the paper has none.
        loss_agg: the paper's average over all tokens of the step is `"token-mean"`.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "group_normalize"
    policy_loss = "cispo"
    hyper_parameters = ("clip_min", "clip_max")

    def __init__(
        self,
        *,
        clip_min: float = 0.0,
        clip_max: float = 5.0,
        kl_coef: float = 0.0,
        loss_agg: LossAggregation = "token-mean",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        self.clip_min, self.clip_max = clip_min, clip_max
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)
        check_number("algo.clip_min", clip_min, at_least=0)
        check_number("algo.clip_max", clip_max, at_least=1)
        if clip_min > 1:
            raise InputError(f"algo.clip_min={clip_min} is above 1, so that fresh samples would be clipped; lower it")

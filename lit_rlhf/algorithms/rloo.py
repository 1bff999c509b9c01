"""RLOO: REINFORCE Leave-One-Out (Ahmadian et al., arXiv 2402.14740; Kool et al. 2019).

    grad J = E[ 1/G sum_i A_i grad log pi_theta(o_i | q) ],      A_i = R_i - 1/(G-1) sum_{j != i} R_j
    R_i    = score_i - beta log( pi_old(o_i | q) / pi_ref(o_i | q) )             the KL of the whole sequence

Exactly unbiased: the baseline of a sample does not contain it, and nothing is divided by a length or a deviation.
The loss sums over tokens; the constant 1/max_new_tokens only sets its scale. For several updates per rollout
`policy_loss="sequence_clip" loss_agg="seq-mean-token-mean"` is TRL's form, PPO's clip on the sequence's ratio.
"""

from __future__ import annotations

from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule


class RLOO(OnPolicyModule):
    """The score function with the mean of the other samples as the baseline.

    Choose it for an unbiased gradient with little variance.

    Example:
        module = RLOO(policy="tiny", group_size=4, kl_coef=0.1)

    Args:
        kl_coef: beta, weight of the sequence's KL in the reward (TRL's 0.05; the paper has 0.03 to 0.10).
        loss_agg: `"seq-mean-token-sum"`, or the same over a constant length.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "rloo"
    policy_loss = "reinforce"
    kl_in = "reward"

    def __init__(
        self,
        *,
        kl_coef: float = 0.05,
        loss_agg: LossAggregation = "seq-mean-token-sum-norm",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)

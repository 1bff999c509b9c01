"""GSPO: Group Sequence Policy Optimization (Qwen, arXiv 2507.18071, eq. 5 to 7).

    J = E[ 1/G sum_i min(s_i A_i, clip(s_i, 1-eps_low, 1+eps_high) A_i) ],    A_i = (R_i - mean_g R) / std_g R
    s_i = ( pi_theta(o_i | q) / pi_old(o_i | q) )^(1/|o_i|) = exp( 1/|o_i| sum_t log r_it )

The ratio, and so the clip, is of the sequence that was rewarded and not of its tokens. The paper splits a rollout into
four minibatches; with one, the ratio is 1 and GSPO's gradient is GRPO's. `policy_loss="gspo_token"` is the paper's
GSPO-token (eq. 13 and 14): the same in value and gradient for one advantage per row, and fit for one per token.
"""

from __future__ import annotations

from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule


class GSPO(OnPolicyModule):
    """Group-relative advantages, the clip on the length-normalised ratio of the sequence.

    Choose it for long completions, mixtures of experts and large models, where ratios of single tokens are noise.

    Example:
        module = GSPO(policy="tiny", minibatches=2)

    Args:
        clip_ratio_low: eps_low; of a mean log-ratio, hence two orders of magnitude below a token's.
        clip_ratio_high: eps_high.
        kl_coef: beta, weight of a KL term; the paper has none.
        loss_agg: every token carries its row's loss, so `"seq-mean-token-mean"` is the paper's mean over rows.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "group_normalize"
    policy_loss = "gspo"
    minibatches = 4
    hyper_parameters = ("clip_ratio_low", "clip_ratio_high")

    def __init__(
        self,
        *,
        clip_ratio_low: float = 3e-4,
        clip_ratio_high: float = 4e-4,
        kl_coef: float = 0.0,
        loss_agg: LossAggregation = "seq-mean-token-mean",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        self.clip_ratio_low, self.clip_ratio_high = clip_ratio_low, clip_ratio_high
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)

"""The field's mathematics as plain functions of tensors: pure, differentiable, torch only."""

from lit_rlhf.functional.advantages import (
    generalized_advantage_estimation,
    group_normalize,
    leave_one_out,
    rewards_to_go,
)
from lit_rlhf.functional.aggregation import aggregate, aggregation_unit
from lit_rlhf.functional.evaluation import majority_at_k, mean_interval, pass_at_k, rate_interval
from lit_rlhf.functional.kl import adaptive_kl_coef, approx_kl, doubling_coef, exact_kl, kl_estimate
from lit_rlhf.functional.linear_logprobs import linear_logprobs
from lit_rlhf.functional.logprobs import token_entropy, token_logprobs
from lit_rlhf.functional.masked import explained_variance, masked_mean, masked_whiten
from lit_rlhf.functional.policy_losses import (
    cispo_policy_loss,
    clip_statistics,
    clipped_policy_loss,
    clipped_value_loss,
    gspo_policy_loss,
    gspo_token_policy_loss,
    importance_weights,
    sequence_clipped_policy_loss,
)
from lit_rlhf.functional.preference_losses import bradley_terry_loss, dpo_loss
from lit_rlhf.functional.shaping import overlong_penalty

__all__ = [
    "adaptive_kl_coef",
    "aggregate",
    "aggregation_unit",
    "approx_kl",
    "bradley_terry_loss",
    "cispo_policy_loss",
    "clip_statistics",
    "clipped_policy_loss",
    "clipped_value_loss",
    "doubling_coef",
    "dpo_loss",
    "exact_kl",
    "explained_variance",
    "generalized_advantage_estimation",
    "group_normalize",
    "gspo_policy_loss",
    "gspo_token_policy_loss",
    "importance_weights",
    "kl_estimate",
    "leave_one_out",
    "linear_logprobs",
    "majority_at_k",
    "masked_mean",
    "masked_whiten",
    "mean_interval",
    "overlong_penalty",
    "pass_at_k",
    "rate_interval",
    "rewards_to_go",
    "sequence_clipped_policy_loss",
    "token_entropy",
    "token_logprobs",
]

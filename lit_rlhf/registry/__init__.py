"""Advantage estimators and policy losses by name, so that a config composes any of one with any of the other.

An estimator is `fn(rewards, mask, **kw) -> (advantages, returns)`, with rewards `[N]` or `[N, T]` and mask
`[N, T]`. A loss is `fn(old_logp, logp, advantages, mask, **kw) -> (loss, metrics)`, with the loss per token
`[N, T]` or a scalar. Each names the keywords it wants, and gets those (see `call_with_named`).

The built-in estimators return both tensors `[N, T]`, 0 outside the mask; the built-in losses return `[N, T]` and
detached `[N, T]` metrics, which the caller averages over the mask.
"""

from lit_rlhf.registry import estimators as _estimators  # noqa: F401  # they register themselves
from lit_rlhf.registry import losses as _losses  # noqa: F401
from lit_rlhf.registry.names import AdvantageEstimator as AdvantageEstimator
from lit_rlhf.registry.names import PolicyLoss as PolicyLoss
from lit_rlhf.registry.names import call_with_named as call_with_named
from lit_rlhf.registry.names import get_adv_estimator as get_adv_estimator
from lit_rlhf.registry.names import get_policy_loss as get_policy_loss
from lit_rlhf.registry.names import has_ratio as has_ratio
from lit_rlhf.registry.names import import_path as import_path
from lit_rlhf.registry.names import register_adv_estimator as register_adv_estimator
from lit_rlhf.registry.names import register_policy_loss as register_policy_loss

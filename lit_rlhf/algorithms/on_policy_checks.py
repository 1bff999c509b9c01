"""What the on-policy algorithms refuse, each in one sentence: arguments alone, and sizes once the trainer is known."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.errors import InputError, check_choice, check_number
from lit_rlhf.registry import has_ratio
from lit_rlhf.rollouts.sampler import NO_REWARDS
from lit_rlhf.types import ScoredRollout

if TYPE_CHECKING:
    from lit_rlhf.algorithms.on_policy import OnPolicyModule

_IMPORTANCE = "algo.importance_correction"
_SCALAR_LOSS = (
    "the policy loss returns a scalar, which is used as it is: with micro-batches or ranks of unequal lengths their "
    "tokens weigh differently; return [N, T] and algo.loss_agg averages them exactly"
)
_MOST_COMPLETIONS = 10_000_000  # more are a slip of the hand, and would fill the memory before anything is said


def check_arguments(module: OnPolicyModule) -> None:
    """Refuse arguments that cannot be trained with; warn of those that train something else than they seem to."""
    for name in ("group_size", "prompts_per_rollout", "minibatches", "update_epochs"):
        check_number(f"algo.{name}", getattr(module, name), at_least=1)
    if (completions := module.prompts_per_rollout * module.group_size) > _MOST_COMPLETIONS:
        raise InputError(
            f"algo.prompts_per_rollout={module.prompts_per_rollout} x algo.group_size={module.group_size} are "
            f"{completions} completions in one rollout, more than {_MOST_COMPLETIONS}; give smaller ones"
        )
    check_number("algo.truncation_penalty", module.truncation_penalty)
    check_choice("algo.entropy", module.entropy, ("full", "none"))
    check_number("algo.entropy_coef", module.entropy_coef)
    check_choice("algo.loss_agg", module.loss_agg, get_args(LossAggregation))
    _check_of_the_algorithm(module)
    if module.group_size == 1 and module.compares_within_groups:
        raise InputError(
            f"algo.group_size=1: {type(module).__name__} compares the samples of one prompt with each other "
            f"and needs at least 2; 8 is a good start"
        )
    if module.value == "none" and (module.advantage_estimator == "gae" or module.critic.bootstraps):
        what = "algo.bootstrap_truncated" if module.critic.bootstraps else "algo.advantage_estimator=gae"
        raise InputError(f"{what} needs a value function; write algo.value=shared or algo.value=separate")
    if module.sampling.top_p < 1 or module.sampling.top_k > 0:
        warnings.warn(
            "rollout.top_p and rollout.top_k sample from another distribution than the one that is trained; "
            "train with top_p=1 and top_k=0",
            stacklevel=4,
        )
    if module.sampling.temperature == 0:
        raise InputError("rollout.temperature=0 samples greedily and nothing can be learnt from it; use 1.0")


def _check_of_the_algorithm(module: OnPolicyModule) -> None:
    """Clip ratios and discounts, where the algorithm has them."""
    for name in ("clip_ratio_low", "clip_ratio_high"):
        check_number(f"algo.{name}", getattr(module, name, 0.0), at_least=0)
    gamma, gae_lambda = getattr(module, "gamma", 1.0), getattr(module, "gae_lambda", 1.0)
    if not (0 <= gamma <= 1 and 0 <= gae_lambda <= 1):
        raise InputError(f"algo.gamma={gamma} and algo.gae_lambda={gae_lambda} must be from 0 to 1")
    if gamma < 1:  # decision D1
        warnings.warn(f"algo.gamma={gamma} discounts the reward at the end per token; 1 is usual", stacklevel=5)


def warn_of_idle(module: OnPolicyModule, given: Mapping[str, Any]) -> None:
    """Warn, in a sentence each, of arguments that were given and have no effect beside the others."""
    kl_args = ("kl_in", "kl_estimator", "kl_unbiased", "kl_horizon")
    value_args = ("value_coef", "value_clip", "value_lr")
    curriculum_args = ("curriculum_level", "curriculum_decay", "curriculum_prior", "curriculum_floor")
    level = module.importance.level
    idle = [
        (kl_args, not module.kl_coef, "algo.kl_coef=0"),
        (("kl_unbiased",), bool(module.kl_coef) and not module.kl.in_loss, "algo.kl_in=reward"),
        (("kl_horizon",), bool(module.kl_coef) and module.kl.target is None, "no algo.kl_target"),
        (value_args, module.value == "none", "algo.value=none"),
        (("importance_clip_min", "importance_clip_max", "staleness_decay"), level == "none", f"{_IMPORTANCE}=none"),
        (curriculum_args, module.curriculum.kind == "none", "algo.curriculum=none"),
        (("bootstrap_truncated",), module.mask_truncated, "algo.mask_truncated=true"),
        (("normalize_rewards",), _scale_free(module), f"algo.advantage_estimator={module.advantage_estimator}"),
    ]
    for names, without_effect, because in idle:
        for name in (n for n in names if without_effect and given.get(n) not in (None, False)):
            warnings.warn(f"algo.{name} has no effect with {because}; leave it out", stacklevel=4)
    if not has_ratio(module._policy_loss) and level == "auto" and module.update_epochs > 1:
        warnings.warn(
            f"algo.policy_loss={module.policy_loss} has no ratio: passes after the first train on samples of another "
            "policy; write algo.update_epochs=1, algo.importance_correction=token or a loss with a ratio",
            stacklevel=4,
        )
    _warn_of_clip_range(module)


def _scale_free(module: OnPolicyModule) -> bool:
    """Whether advantages are the same for rewards of any mean and scale."""
    by_deviation = module.advantage_estimator == "group_normalize" and getattr(module, "scale_rewards", "std") != "none"
    added = module.kl.in_reward or module.truncation_penalty or module.reward_scaling.clip is not None
    shapes = type(module).shape_rewards.__qualname__ != "OnPolicyModule.shape_rewards"
    return by_deviation and not (added or shapes)


def _warn_of_clip_range(module: OnPolicyModule) -> None:
    """A sequence's mean log-ratio moves two orders of magnitude less than a token's."""
    epsilon, by_sequence = getattr(module, "clip_ratio_high", None), module.policy_loss in ("gspo", "gspo_token")
    if epsilon is None or not (by_sequence or module.policy_loss == "clip"):
        return
    if (by_sequence and epsilon > 0.05) or (not by_sequence and epsilon < 0.005):
        usual = "about 4e-4" if by_sequence else "about 0.2"
        warnings.warn(
            f"algo.clip_ratio_high={epsilon} is far from what algo.policy_loss={module.policy_loss} clips at, {usual}; "
            "give algo.clip_ratio_low and algo.clip_ratio_high",
            stacklevel=5,
        )


def checked_advantages(found: Any) -> tuple[Tensor, Tensor | None]:
    """What an advantage estimator or the hook returned, if it is advantages with returns or None.

    Raises:
        InputError: it is something else.
    """
    if not (isinstance(found, tuple) and len(found) == 2 and found[0] is not None):
        raise InputError(
            f"advantages: expected a tuple (advantages, returns), of which returns may be None; got {_kind(found)}"
        )
    return found


def _kind(found: Any) -> str:
    return f"a tuple of {len(found)}" if isinstance(found, tuple) else f"a {type(found).__name__}"


def per_token(x: Any, rollout: ScoredRollout) -> Tensor | None:
    """`[N, T]` from that, or from one number per row `[N]`; None stays None.

    Raises:
        InputError: it has another shape, or is no tensor.
    """
    if x is None:
        return None
    N, T = rollout.response_mask.shape
    shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    if shape not in ((N,), (N, T)):
        raise InputError(f"compute_advantages: expected tensors [N, T] or [N], here {(N, T)} or {(N,)}, got {shape}")
    return rollout.spread(x) if x.ndim == 1 else x


def checked_loss(found: Any, mask: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
    """What a policy loss returned, if it is a loss, `[N, T]` or a scalar, and a mapping of metrics.

    Raises:
        InputError: it is something else.
    """
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
        raise InputError("policy_loss must return (loss, metrics), the metrics a dictionary; (loss, {}) for none")
    loss, metrics = found
    if not isinstance(loss, Tensor) or loss.shape not in (mask.shape, ()):
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"policy_loss must return a loss [N, T], here {tuple(mask.shape)}, or a scalar; got {shape}")
    return loss, metrics


def check_scalar(module: OnPolicyModule, weights: Tensor | None) -> None:
    """Say what a scalar loss cannot have.

    Raises:
        InputError: some rows are to be weighed, or the micro-batch is taken in parts.
    """
    if module.parts.tokens is not None:
        raise InputError(
            "policy_loss: a scalar says nothing of the parts that algo.micro_batch_tokens makes of a micro-batch; "
            "return [N, T], or leave algo.micro_batch_tokens out"
        )
    if weights is not None and bool((weights != 1).any()):
        raise InputError(
            "policy_loss: a scalar cannot be weighed by the importance of its rows; return [N, T], or write "
            f"{_IMPORTANCE}=none"
        )
    warnings.warn(_SCALAR_LOSS, stacklevel=3)  # Python shows it once


def check_loop(module: OnPolicyModule) -> None:
    """Refuse batch sizes that do not divide over ranks and micro-batches, and limits that cut rollouts."""
    if module.rewards is None:
        raise InputError(NO_REWARDS)
    if module.target_kl.target is not None and isinstance(module.trainer.strategy, DeepSpeedStrategy):
        raise InputError(
            "algo.target_kl leaves optimiser steps out, and DeepSpeed takes every one; leave it out, or write "
            "trainer=fsdp2"
        )
    limit = module.trainer.limit_train_batches
    if isinstance(limit, int) or limit != 1.0:  # 1 is one batch, 1.0 is all of them
        raise InputError(
            f"trainer.limit_train_batches={limit} would cut rollouts in pieces; "
            f"limit trainer.max_epochs (rollouts) or trainer.max_steps instead"
        )
    if module.prompts_per_rollout % module.world_size:
        raise InputError(
            f"algo.prompts_per_rollout={module.prompts_per_rollout} does not divide over {module.world_size} "
            f"devices; make it a multiple of {module.world_size}"
        )
    rows, parts = module.prompts_per_rank * module.group_size, module.minibatches * module.accumulate
    if rows % parts:
        raise InputError(
            f"{rows} samples per device (algo.prompts_per_rollout={module.prompts_per_rollout} x algo.group_size="
            f"{module.group_size} / {module.world_size} devices) do not divide into algo.minibatches="
            f"{module.minibatches} x trainer.accumulate_grad_batches={module.accumulate} parts; change one of them"
        )

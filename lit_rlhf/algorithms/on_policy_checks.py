"""What the on-policy algorithms refuse, each in one sentence: arguments alone, and sizes once the trainer is known."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, get_args

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.errors import InputError, check_choice, check_number
from lit_rlhf.rollouts.sampler import NO_REWARDS

if TYPE_CHECKING:
    from lit_rlhf.algorithms.on_policy import OnPolicyModule

GROUP_ESTIMATORS = ("group_normalize", "rloo")  # meaningless with one sample per prompt


def check_arguments(module: OnPolicyModule) -> None:
    """Refuse arguments that cannot be trained with; warn of those that train something else than they seem to."""
    for name in ("group_size", "prompts_per_rollout", "minibatches", "update_epochs"):
        check_number(f"algo.{name}", getattr(module, name), at_least=1)
    check_number("algo.truncation_penalty", module.truncation_penalty)
    check_choice("algo.entropy", module.entropy, ("full", "none"))
    check_number("algo.entropy_coef", module.entropy_coef)
    check_choice("algo.loss_agg", module.loss_agg, get_args(LossAggregation))
    if module.group_size == 1 and module.advantage_estimator in GROUP_ESTIMATORS:
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
            stacklevel=3,
        )
    if module.sampling.temperature == 0:
        raise InputError("rollout.temperature=0 samples greedily and nothing can be learnt from it; use 1.0")


def check_loop(module: OnPolicyModule) -> None:
    """Refuse batch sizes that do not divide over ranks and micro-batches, and limits that cut rollouts."""
    if module.rewards is None:
        raise InputError(NO_REWARDS)
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

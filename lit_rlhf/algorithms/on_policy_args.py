"""The keyword arguments of the on-policy algorithms, typed: the `**on_policy` of their signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lit_rlhf.algorithms.base import ModuleArgs
from lit_rlhf.algorithms.critic import CriticArgs
from lit_rlhf.algorithms.kl_penalty import KLArgs, Place
from lit_rlhf.algorithms.reward_scaling import RewardArgs
from lit_rlhf.models.wrapper import ValueKind
from lit_rlhf.rollouts.curriculum import CurriculumArgs
from lit_rlhf.rollouts.importance import ImportanceArgs, Level


class TemplateArgs(ModuleArgs, KLArgs, CriticArgs, ImportanceArgs, RewardArgs, CurriculumArgs, total=False):
    """The keyword arguments that `OnPolicyModule` hands on to its parts."""


class OnPolicyArgs(TemplateArgs, total=False):
    """The keyword arguments of `OnPolicyModule`, which every on-policy algorithm passes on."""

    lr: float | None
    group_size: int
    prompts_per_rollout: int
    minibatches: int | None
    update_epochs: int | None
    advantage_estimator: str | Callable[..., Any] | None
    policy_loss: str | Callable[..., Any] | None
    kl_in: Place | None
    whiten_advantages: bool | None
    value: ValueKind | None
    importance_correction: Level | None
    target_kl: float | None
    entropy_coef: float
    entropy: Literal["full", "none"]
    truncation_penalty: float
    mask_truncated: bool
    skip_zero_advantage: bool

"""Learning rates: the peak that suits a policy's size, and the schedule as a factor of the optimiser step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import base_size, is_adapted

_TABLE = ((1e9, 5e-6, 1e-5), (10e9, 1e-6, 5e-6), (70e9, 5e-7, 1e-6), (math.inf, 1e-7, 5e-7))  # parameters below, range
_LORA = 10.0  # adapters take rates ten times as high
_FAR = 10.0  # how far outside of the range a rate has to be for a warning

Schedule = Literal["constant", "linear", "cosine"]

DECAY: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def lr_factor(step: int, schedule: Schedule, warmup_steps: int, total_steps: int | None) -> float:
    """Learning rate of optimiser step `step`, from 0, relative to the peak.

    Rises linearly over `warmup_steps` and then follows the schedule, reaching 0 after `total_steps`.
    Without an end (`None`) it stays at 1.

    >>> [round(lr_factor(step, "linear", 2, 6), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None or total_steps <= warmup_steps:
        return 1.0
    return DECAY[schedule](min(1.0, (step - warmup_steps) / (total_steps - warmup_steps)))


def recommended_lr(parameters: int, lora: bool = False) -> float:
    """Peak learning rate for reinforcement learning of a policy with that many parameters.

        lr = 5e-6 * sqrt(1e9 / parameters)          ten times that where LoRA adapters are trained instead

    A curve through the table that Flux's documentation gives for 0.5 to 70 billion parameters (1e-5 down to
    5e-7; within a factor of 1.6 of it everywhere); at 0.8 million it is what the built-in model learns best with.

    >>> f"{recommended_lr(790_144):.1e} {recommended_lr(500_000_000):.1e} {recommended_lr(7_000_000_000):.1e}"
    '1.8e-04 7.1e-06 1.9e-06'
    """
    return 5e-6 * math.sqrt(1e9 / max(parameters, 1)) * (_LORA if lora else 1.0)


def learning_rate_range(parameters: int, lora: bool = False) -> tuple[float, float]:
    """Lowest and highest peak learning rate for reinforcement learning of a policy with that many parameters.

    The table of Flux's documentation, by full size; ten times that where LoRA adapters are trained instead.

    >>> learning_rate_range(500_000_000), learning_rate_range(7_000_000_000, lora=True)
    ((5e-06, 1e-05), (1e-05, 5e-05))
    """
    low, high = next((low, high) for below, low, high in _TABLE if parameters < below)
    return (round(low * _LORA, 12), round(high * _LORA, 12)) if lora else (low, high)


def default_lr(policy: nn.Module, usual: float | None) -> float:
    """Peak learning rate where none is given.

    Args:
        policy: with adapters or without.
        usual: the rate that the field trains whole models with, whatever their size; None for `recommended_lr`.
    """
    lora = is_adapted(policy)
    return recommended_lr(base_size(policy), lora) if usual is None else round(usual * (_LORA if lora else 1.0), 12)


def check_learning_rate(lr: float | None, policy: nn.Module) -> None:
    """Warn of a learning rate more than ten times outside of what fits the policy's size.

    The table has one range for all that is smaller than a billion parameters; below, the highest rate grows as
    `recommended_lr` does.
    """
    parameters, lora = base_size(policy), is_adapted(policy)
    low, high = learning_rate_range(parameters, lora)
    recommended = recommended_lr(parameters, lora)
    high = max(high, recommended)
    trained = "LoRA adapters of a policy" if lora else "a policy"
    if lr is not None and not low / _FAR <= lr <= high * _FAR:
        warnings.warn(
            f"algo.lr={lr:g} is far from the {low:.2g} to {high:.2g} that fits {trained} of {parameters:,} parameters; "
            f"leave it out for {recommended:.2g}",
            stacklevel=5,
        )


def check_betas(betas: Any) -> None:
    """Raise an `InputError` for what AdamW's betas cannot be."""
    given = list(betas) if isinstance(betas, Sequence) else []
    if len(given) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in given):
        raise InputError(f"algo.betas must be two numbers from 0 to below 1, got {given or betas}")

"""Learning-rate schedules, as a factor of the optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

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

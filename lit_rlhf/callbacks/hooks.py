"""The hooks through which callbacks see what a run samples and logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.types import Experience


class RLHFCallback(Callback):
    """A callback with two more hooks, both called on every rank."""

    def on_rollout(self, trainer: Trainer, module: Any, experience: Experience) -> None:
        """A rollout has been collected and is about to be trained on.

        Args:
            trainer: the run's.
            module: the algorithm; `module.loop.iteration` rollouts lie behind it.
            experience: this rank's N rows.
        """

    def on_metrics(self, trainer: Trainer, module: LightningModule, values: Mapping[str, float]) -> None:
        """Something is logged: once per rollout (or pass), and once per validation.

        Args:
            trainer: the run's.
            module: the algorithm.
            values: what the loggers get, reduced over the ranks, by name. A rollout's have `rollout/iteration` among
                them, a validation's begin with `val/`.
        """

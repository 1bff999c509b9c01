"""Checkpoints that are as recent as they say."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.errors import check_number

_ROLLOUTS = 25


class RolloutCheckpoint(ModelCheckpoint):
    """Save every so many rollouts, and at the end; `last.ckpt` is the newest.

    Lightning's own saves only when it validates, unless it validates at every epoch, and does not save at the end.

    Args:
        every_n_epochs: rollouts or passes between two checkpoints; by default 25 rollouts, and every pass.
        every_n_train_steps: optimiser steps between two checkpoints, instead.
        **kwargs: of `lightning.pytorch.callbacks.ModelCheckpoint`.
    """

    def __init__(
        self, every_n_epochs: int | None = None, every_n_train_steps: int | None = None, **kwargs: Any
    ) -> None:
        defaults = {"save_last": True, "save_on_train_epoch_end": True, "enable_version_counter": False}
        for name, every in (("every_n_epochs", every_n_epochs), ("every_n_train_steps", every_n_train_steps)):
            check_number(f"callbacks.checkpoint.{name}", 1 if every is None else every, at_least=1)
        self._passes_apart = every_n_epochs is None and every_n_train_steps is None
        when: dict[str, Any] = {"every_n_epochs": every_n_epochs or _ROLLOUTS}
        if every_n_train_steps is not None:
            when = {"every_n_train_steps": every_n_train_steps}
        super().__init__(**when, **{**defaults, **kwargs})
        self._waits_for_end = False  # of the rollout

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save after every pass over the data, which may take hours where a rollout takes seconds."""
        super().setup(trainer, pl_module, stage)
        if self._passes_apart and not hasattr(pl_module, "collect"):
            self._every_n_epochs = 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save, if it is time; after a rollout's last micro-batch only when it has been logged and validated."""
        loop = getattr(pl_module, "loop", None)
        if loop is not None and not loop.position:
            self._waits_for_end = self._every_n_train_steps > 0
        else:
            super().on_train_batch_end(trainer, pl_module, *args)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if it is time."""
        if self._waits_for_end:
            self._waits_for_end = False
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best score so far, also in another run folder, where Lightning would forget it."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def save_now(self, trainer: Trainer) -> str:
        """Save `last.ckpt`, wherever in a rollout the run stands; returns its path."""
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.last_model_path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run, unless it has just been saved; say so where what to monitor was never logged."""
        super().on_train_end(trainer, pl_module)
        if self.monitor is not None and not self.best_model_path:
            logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            rank_zero_warn(
                f"{self.filename}.ckpt was not saved: {self.monitor} was never logged while training, "
                f"which takes a validation that measures it; validation logged {logged or 'nothing'}"
            )
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self.save_now(trainer)

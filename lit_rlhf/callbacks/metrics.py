"""The hook through which a callback reads what a run logs."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer


class MetricsCallback(Callback):
    """A callback that is handed all that is logged, once per rollout (or pass) and once per validation."""

    def on_metrics(self, trainer: Trainer, module: LightningModule, values: Mapping[str, float]) -> None:
        """Called on every rank with what the loggers get, reduced over the ranks.

        Args:
            trainer: the run's.
            module: the algorithm.
            values: by name; a rollout's have `rollout/iteration` among them, a validation's begin with `val/`.
        """

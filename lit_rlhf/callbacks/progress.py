"""One line that counts rollouts (or passes) and shows the time left, reward and accuracy."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm  # type: ignore[import-untyped]

_NAMES = {  # a line has little room; the last are left out first
    "reward/reward_mean": "reward",
    "reward/accuracy": "accuracy",
    "stability/approx_kl": "kl",
    "perf/tokens_per_second": "tokens/s",
    "stability/entropy": "entropy",
}
_SLACK = 5  # columns that the count and the time left may grow by
_FORMAT = "{desc} |{bar:8}| {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}"


class RolloutProgressBar(ProgressBar):
    """A bar over the epochs of the fit, one per rollout, with the module's `progress_keys`.

    On a terminal it is one line that moves; elsewhere a line is written every tenth of the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Any = None

    def disable(self) -> None:
        """Be quiet; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Be heard again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar where the run stands."""
        self._bar = tqdm(
            total=trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None,
            initial=trainer.current_epoch,
            desc=type(pl_module).__name__,
            unit="rollouts" if hasattr(pl_module, "collect") else "passes",
            bar_format=_FORMAT,
            disable=not self._enabled,
            file=sys.stderr,
            dynamic_ncols=sys.stderr.isatty(),
            mininterval=0.1 if sys.stderr.isatty() else float("inf"),
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the rollout that ended: its metrics are there only after its epoch's last hook."""
        self._show(trainer, trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last rollout and close the bar."""
        self._show(trainer, trainer.current_epoch)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error's sentence stands on a line of its own."""
        self._close()

    def _show(self, trainer: Trainer, done: int) -> None:
        if self._bar is None or done <= self._bar.n:
            return
        self._bar.set_postfix_str("", refresh=False)
        room = self._bar.format_dict["ncols"] - len(str(self._bar)) - _SLACK if sys.stderr.isatty() else float("inf")
        self._bar.set_postfix_str(_shown(trainer.progress_bar_metrics, room), refresh=False)
        self._bar.update(done - self._bar.n)
        total = self._bar.total
        between = done != total and done % max(1, (total or 100) // 10) == 0  # the last line comes with the close
        if self._enabled and not sys.stderr.isatty() and between:
            self._bar.refresh()
            sys.stderr.write("\n")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _shown(metrics: Mapping[str, Any], room: float) -> str:
    """As many metrics as have room: a number that is cut off would be another number."""
    order = {name: place for place, name in enumerate(_NAMES)}
    names = sorted(metrics, key=lambda name: order.get(name, len(order)))
    shown = [f"{_NAMES.get(name, name.split('/')[-1])} {_short(metrics[name])}" for name in names]
    ends = accumulate(len(", " + text) for text in shown)
    return ", ".join(text for text, end in zip(shown, ends, strict=True) if end <= room)


def _short(value: Any) -> str:
    """Three decimals of what is small, none of what is large."""
    number = float(value)
    return f"{number:.3f}" if abs(number) < 100 else f"{number:,.0f}"

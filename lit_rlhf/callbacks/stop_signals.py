"""What asks a run to stop from outside (SIGTERM, Ctrl-C, a SLURM requeue) leaves a checkpoint behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lit_rlhf.callbacks.checkpoint import RolloutCheckpoint
from lit_rlhf.ranks import sum_over_ranks


class StopSignals(Callback):
    """On SIGTERM or Ctrl-C, finish the micro-batch, save `last.ckpt` and exit with 128 + the signal's number.

    The handler itself only takes a note: whatever the process is in the middle of is finished first. The ranks look at
    their notes together, after each micro-batch, so that a signal to any of them stops all at the same place, where
    Lightning's own handlers save, and talk to other ranks, in the middle of whatever is going on. A second Ctrl-C ends
    at once.

    Under SLURM the signal that its `#SBATCH --signal` announces the time limit by (SIGUSR1) has the job requeued, too.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number
        self._requeue: tuple[int, ...] = ()
        self._stopping: list[int] = []
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over; Lightning has just set its own handlers."""
        self.received = 0
        if threading.current_thread() is not threading.main_thread():
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, _AfterTheOthers) for callback in callbacks):
            callbacks.append(_AfterTheOthers(self))
        self._requeue = _requeue_signal(trainer)
        for number in (signal.SIGTERM, signal.SIGINT, *self._requeue):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
        if number == signal.SIGINT:
            print("\nstopping as soon as this step is done; Ctrl-C again ends at once", file=sys.stderr)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Stop here, if any rank has been asked to; after a rollout's last micro-batch when it has been logged.

        Raises:
            SystemExit: it has.
        """
        self._stopping = self._asked(pl_module)
        if self._stopping and pl_module.loop.position:
            self._stop(trainer, self._stopping)

    def at_rollout_end(self, trainer: Trainer) -> None:
        """Stop now, if that was left to the end of the rollout.

        Raises:
            SystemExit: it was.
        """
        if self._stopping:
            self._stop(trainer, self._stopping)

    def _stop(self, trainer: Trainer, asked: list[int]) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)  # nothing disturbs the save: launchers send the ranks another
        keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, RolloutCheckpoint) and c.save_last]
        saved = [keeper.save_now(trainer) for keeper in keepers]
        if trainer.is_global_zero:
            where = f"resume with ckpt_path={saved[0]}" if saved else "nothing is saved without callbacks.checkpoint"
            names = ", ".join(signal.Signals(number).name for number in asked)
            print(f"\nstopped by {names} after optimiser step {trainer.global_step}: {where}", file=sys.stderr)
            if {*self._requeue} & {*asked}:
                subprocess.call(["scontrol", "requeue", _slurm_job()])
        raise SystemExit(128 + asked[0])

    def _asked(self, module: Any) -> list[int]:
        """The signals that any rank has received."""
        if module.world_size == 1:
            return [self.received] if self.received else []
        ranks = torch.zeros(signal.NSIG, device=module.device)
        ranks[self.received] = 1
        return [number for number in sum_over_ranks(ranks).nonzero().flatten().tolist() if number]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the signals to Lightning, which leaves them to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same."""
        self.on_train_end(trainer, pl_module)


class _AfterTheOthers(Checkpoint):
    """Lightning calls checkpoint callbacks last, when a rollout is logged, and those that save before this one."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.at_rollout_end(trainer)


def _requeue_signal(trainer: Trainer) -> tuple[int, ...]:
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return ()
    return (environment.requeue_signal or signal.SIGUSR1,)


def _slurm_job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]

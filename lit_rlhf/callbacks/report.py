"""Leaves `report.html` in the run's folder."""

from __future__ import annotations

import json
import platform
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.durable import write_text
from lit_rlhf.errors import InputError
from lit_rlhf.monitoring.page import write_report
from lit_rlhf.monitoring.run_folder import ENDED, SECONDS, environment_in
from lit_rlhf.versions import versions


class Report(Callback):
    """Writes `environment.json` when a fit begins, and `report.html` when it ends, however it ends.

    `environment.json` says, too, whether training has come to its end, and how many seconds it took, those before a
    stop included where the run is continued in its folder.

    `python -m lit_rlhf.report FOLDER` writes the page at any other time.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the versions and the machine."""
        self._began = time.monotonic()
        self._about = {**_environment(trainer, pl_module), ENDED: False}
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._earlier = self._seconds_before(trainer.ckpt_path)
            self._note(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page, and how long it took."""
        self._about[ENDED] = True
        self._note(trainer)
        self._write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how long it took so far, for the run that goes on from here."""
        if trainer.state.fn == "fit" and trainer.state.status == "running":
            self._note(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it again with what a validation after the fit has found."""
        if trainer.state.fn == "validate" and trainer.global_step:
            self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write it of what there is."""
        if trainer.state.fn == "fit" and hasattr(self, "_began"):
            self._note(trainer)
        self._write(trainer)

    def _seconds_before(self, checkpoint: str | Path | None) -> float:
        """How long the run has been trained that is continued here; nothing where it comes from elsewhere."""
        if checkpoint is None or self.folder.resolve() not in Path(checkpoint).resolve().parents:
            return 0.0
        with suppress(InputError, OSError):  # a damaged note is not worth a run
            return float(environment_in(self.folder).get(SECONDS, 0.0))
        return 0.0

    def _note(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self._about[SECONDS] = round(self._earlier + time.monotonic() - self._began, 1)
            try:
                write_text(self.folder / "environment.json", json.dumps(self._about, indent=1) + "\n")
            except OSError as error:  # a full disk, which the checkpoint tells to all ranks
                warnings.warn(f"environment.json was not written: {error}", stacklevel=2)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        if not (self.folder / "metrics.csv").is_file():  # nothing has been logged yet
            return
        try:
            write_report(self.folder)
        except Exception as error:  # a page is not worth a run
            warnings.warn(f"report.html was not written: {type(error).__name__}: {error}", stacklevel=2)


def _environment(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else "CPU"
    return {
        **versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": f"{trainer.world_size} x {device}, {type(trainer.strategy).__name__}, {trainer.precision}",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in module.parameters()),
        "trained parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }

"""Leaves `report.html` in the run's folder."""

from __future__ import annotations

import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.errors import InputError
from lit_rlhf.monitoring.page import write_report
from lit_rlhf.versions import versions


class Report(Callback):
    """Writes `environment.json` when a fit begins, and `report.html` when it ends, however it ends.

    `python -m lit_rlhf.report FOLDER` writes the page at any other time.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the versions and the machine."""
        self._began = time.monotonic()
        self._about = _environment(trainer, pl_module)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._note()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page, and how long it took."""
        self._about["seconds of training"] = round(time.monotonic() - self._began, 1)
        if trainer.is_global_zero:
            self._note()
        self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it again with what a validation after the fit has found."""
        if trainer.state.fn == "validate" and trainer.global_step:
            self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write it of what there is."""
        self._write(trainer)

    def _note(self) -> None:
        text = json.dumps(self._about, indent=1) + "\n"
        (self.folder / "environment.json").write_text(text, encoding="utf-8")

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        try:
            write_report(self.folder)
        except InputError:  # nothing has been logged yet
            return
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

"""Write the trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class HFExport(Callback):
    """At the end of the fit, save policy and tokenizer to `folder`; `from_pretrained` loads it.

    Args:
        folder: where to; it is made if needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save, on the first rank."""
        if trainer.is_global_zero:
            pl_module.models.policy.save_pretrained(self.folder)
            pl_module.tokenizer.save_pretrained(self.folder)

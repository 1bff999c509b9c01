"""Write what was trained as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class HFExport(Callback):
    """At the end of the fit, save the trained model and its tokenizer to `folder`; `from_pretrained` loads them.

    Args:
        folder: where to; it is made if needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save, on the first rank."""
        if trainer.is_global_zero:
            pl_module.export_model().save_pretrained(self.folder)
            pl_module.tokenizer.save_pretrained(self.folder)

"""Checkpoints that are never half written and never run code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf.errors import InputError

_HANDED_OVER = ".temp.ckpt"  # bare weights, in which Lightning's forked or spawned ranks return what they have learnt


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary name and rename: a file with a checkpoint's name is a whole checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save `checkpoint` at `path`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part")
        torch.save(checkpoint, temporary)
        temporary.replace(target)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load with `weights_only=True`: tensors and plain containers, nothing that runs.

        Raises:
            InputError: there is no such file, or it is no whole checkpoint.
        """
        if not Path(path).is_file():
            raise InputError(f"ckpt_path: there is no file {path}")
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"ckpt_path: {path} is not a readable checkpoint ({type(error).__name__})") from error
        ours = isinstance(loaded, dict) and "lit_rlhf" in loaded
        if not ours and Path(path).name != _HANDED_OVER:
            raise InputError(
                f"ckpt_path: {path} is not a checkpoint of lit_rlhf; give one of the run folder's checkpoints/"
            )
        return loaded

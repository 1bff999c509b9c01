"""Checkpoints that are never half written and never run code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf.durable import part_of, remove, replace, standing, write_durably, writing
from lit_rlhf.errors import InputError
from lit_rlhf.sharded_checkpoints import check_takes_a_checkpoint, is_sharded_checkpoint, load_merged

_LAST = "checkpoints/last.ckpt"  # of a run folder
_DATED = re.compile(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d")  # the end of a run folder's path that the user did not choose
_NEEDED = ("state_dict", "loops", "epoch", "global_step", "pytorch-lightning_version")
_HANDED_OVER = ".temp.ckpt"  # bare weights, in which Lightning's forked or spawned ranks return what they have learnt


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary name and rename: a file with a checkpoint's name is a whole checkpoint.

    It is on the disk before it has the name, so that a power failure leaves the one before or this one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save `checkpoint` at `path`, where a checkpoint of shards may stand.

        Raises:
            InputError: it cannot be written, as when the disk is full; what stood at `path` stands there still.
        """
        target = Path(path)
        temporary = part_of(target)
        check_takes_a_checkpoint(target)
        with writing(target):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                remove(temporary)  # of shards, a folder
                write_durably(checkpoint, temporary)
                replace(target, temporary)
            except (OSError, RuntimeError):
                remove(temporary)
                raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load with `weights_only=True`: tensors and plain containers, nothing that runs; shards are put together.

        Raises:
            InputError: there is no such file, or it is no whole checkpoint.
        """
        path = standing(Path(path))
        if is_sharded_checkpoint(path):
            return load_merged(path)
        if not path.is_file():
            raise InputError(f"ckpt_path: there is no file {path}")
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"ckpt_path: {path} is not a readable checkpoint ({type(error).__name__})") from error
        ours = isinstance(loaded, dict) and "lit_rlhf" in loaded
        if not ours and path.name != _HANDED_OVER:
            raise InputError(
                f"ckpt_path: {path} is not a checkpoint of lit_rlhf; give one of the run folder's checkpoints/"
            )
        if ours and (missing := [name for name in _NEEDED if name not in loaded]):
            raise InputError(f"ckpt_path: {path} is no whole checkpoint, {missing[0]!r} is missing; give another")
        return loaded


def last_checkpoint(run_folder: str | Path) -> Path | None:
    """What `ckpt_path=last` means: the folder's own `checkpoints/last.ckpt`, or that of the newest run before it.

    A folder that the user has chosen (`hydra.run.dir=FOLDER`) is looked at alone, so that the same command begins a run
    and, whenever it is given again, continues it.

    Args:
        run_folder: of the run that is about to begin.

    Returns:
        The file; None where a chosen folder has none yet.

    Raises:
        InputError: there is no run before this one.
    """
    folder = Path(run_folder).resolve()
    own = standing(folder / _LAST)
    if own.exists():
        return own
    if not _DATED.fullmatch(f"{folder.parent.name}/{folder.name}"):
        return None
    runs = folder.parents[1].glob("*/*")
    found = [file for run in runs if (file := standing(run / _LAST)).exists()]
    if not found:
        raise InputError(f"ckpt_path=last: there is no run with a {_LAST} in {folder.parents[1]}; leave ckpt_path out")
    return max(found, key=lambda file: file.stat().st_mtime_ns)

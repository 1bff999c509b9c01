"""Files and folders that are whole under their name, or stand under another one until they are."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_rlhf.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_durably(content: Any, file: Path) -> None:
    """Save `content`, and have it on the disk."""
    import torch

    with file.open("wb") as opened:
        torch.save(content, opened)
        opened.flush()
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def part_of(path: Path) -> Path:
    """Where something is written before it is whole."""
    return path.with_name(f".{path.name}.part")


def write_text(file: Path, text: str) -> None:
    """Write a text file that is the former one or the whole new one, whenever the process ends."""
    part = part_of(file)
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def standing(path: Path) -> Path:
    """Where what has this name stands: beside it, if the process that was to replace it ended in the midst of that."""
    return old if not path.exists() and (old := _aside(path)).exists() else path


def replace(path: Path, new: Path) -> None:
    """Give `new`, which is whole and on the disk, the name `path`, whether either is a file or a folder.

    Only a file takes the place of a file at once. A folder, or what it replaces, is put aside first, where `standing`
    finds it until `new` has the name.
    """
    old = _aside(path)
    if path.is_dir() or (new.is_dir() and path.exists()):
        remove(old)
        path.rename(old)
    try:
        new.replace(path)
    except OSError:
        if (left := standing(path)) != path:
            left.rename(path)
        raise
    sync_folder(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder, or what can be removed of it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # there is none, or the disk is gone altogether
        path.unlink()


@contextmanager
def writing(path: Path, where: str = "") -> Iterator[None]:
    """Make one sentence of why the checkpoint `path` cannot be written.

    Raises:
        InputError: it cannot.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of its writer's
        cause = _cause(error)
        advice = "make room" if cause is not None and cause.errno in _FULL else "put that right"
        if standing(path).exists():
            advice = f"the one before it is kept; {advice} and resume from that"
        raise InputError(f"the checkpoint {path} could not be written ({reason_of(error)}{where}): {advice}") from error


def reason_of(error: Exception) -> str:
    """Why something could not be written."""
    cause = _cause(error)
    return (cause.strerror if cause is not None else None) or " ".join(str(error).split())


def _cause(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")

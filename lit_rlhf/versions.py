"""Which code a run was made with: the versions of the packages that matter, and the commits of the checkouts."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("lit_rlhf", "torch", "lightning", "transformers", "torchmetrics", "wandb", "peft", "vllm")


def versions() -> dict[str, str]:
    """By name. `commit` is that of the folder that the run was started in and `lit_rlhf commit` the library's own.

    Only what is a git checkout has one; `-dirty` at its end says that files differ from it.
    """
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    here, own = Path.cwd(), Path(__file__).parent
    tracked = _git(own, "ls-files", "--error-unmatch", "versions.py")  # an environment in a checkout is no part of it
    commits = {"commit": commit_of(here), "lit_rlhf commit": commit_of(own) if tracked else None}
    return found | {name: commit for name, commit in commits.items() if commit}


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out there, with `-dirty` where tracked files differ from it; None of no checkout."""
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, which changes nothing and runs no program of the checkout's; None where it cannot tell."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None

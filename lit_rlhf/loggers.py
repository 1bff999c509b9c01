"""Loggers as a run wants them."""

from __future__ import annotations

import itertools
import netrc
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

_PER_ROLLOUT = ("loss", "stability", "reward", "rewards", "rollout", "preference", "curriculum", "policy", "perf")
_BEST = {
    **dict.fromkeys(
        ("val/accuracy_sampled", "val/accuracy_greedy", "val/reward_sampled", "val/preference_accuracy"), "max"
    ),
    **dict.fromkeys(("reward/reward_mean", "reward/accuracy", "preference/preference_accuracy"), "max"),
    **dict.fromkeys(("val/sft_loss", "val/perplexity"), "min"),
}


def csv_logger(save_dir: str | Path) -> CSVLogger:
    """Write `metrics.csv` into `save_dir` after every rollout.

    A file that is there already, of a run that is continued in its own folder, is kept as `metrics.1.csv`,
    `metrics.2.csv` and so on.
    """
    keep_aside(Path(save_dir) / "metrics.csv")
    return CSVLogger(save_dir, name="", version="", flush_logs_every_n_steps=1)


@rank_zero_only
def keep_aside(file: Path) -> None:
    """Rename a file or folder that exists to the first free number."""
    if file.exists():
        names = (file.with_name(f"{file.stem}.{i}{file.suffix}") for i in itertools.count(1))
        file.rename(next(name for name in names if not name.exists()))


def wandb_logger(
    save_dir: str | Path, project: str = "lit_rlhf", continues: str | Path | None = None, **kwargs: Any
) -> WandbLogger:
    """A W&B logger that needs no account: online where the user is logged in, offline otherwise.

    `WANDB_MODE` decides where it is set. The offline run lies in `save_dir`; `wandb sync` uploads it.

    Args:
        save_dir: folder of the run.
        project: W&B project.
        continues: a checkpoint in the `checkpoints/` of a run folder; the W&B run of that folder goes on.
        **kwargs: passed to `lightning.pytorch.loggers.WandbLogger`.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    if "WANDB_MODE" not in os.environ and not _logged_in():
        os.environ["WANDB_MODE"] = "offline"  # before wandb is first imported, which reads it
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    folder = None if continues is None else Path(continues).resolve().parent
    if folder is not None and folder.name == "checkpoints" and (found := _run_id(folder.parent)):
        kwargs = {"id": found, "resume": "allow", **kwargs}
    logger = _RolloutWandbLogger(project=project, save_dir=save_dir, **kwargs)
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes it, and wandb warns that it means nothing
    return logger


class _RolloutWandbLogger(WandbLogger):
    """Lightning's, with rollouts on the x-axis of what is measured per rollout, and best values in the summary."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; the first access begins it."""
        begins = self._experiment is None
        run = super().experiment
        if begins:
            for section in _PER_ROLLOUT:
                run.define_metric(f"{section}/*", step_metric="rollout/iteration")
            for name, best in _BEST.items():
                step = "trainer/global_step" if name.startswith("val/") else "rollout/iteration"
                run.define_metric(name, step_metric=step, summary=f"{best},last")
        return run


def _run_id(run_folder: Path) -> str | None:
    """The id of the newest W&B run in the folder, from the name that W&B gives its files."""
    names = sorted(folder.name.removeprefix("offline-") for folder in run_folder.glob("wandb/*run-*"))
    found = [match[1] for name in names if (match := re.fullmatch(r"run-\d{8}_\d{6}-(.+)", name))]
    return found[-1] if found else None


def _logged_in() -> bool:
    """Whether there is a key, where `wandb login` and the environment leave it; asks nobody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

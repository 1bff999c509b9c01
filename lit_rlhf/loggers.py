"""Loggers as a run wants them."""

from __future__ import annotations

import itertools
import netrc
import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_rlhf.config import check_log_model
from lit_rlhf.versions import versions

LogModel = Literal["all"] | bool

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
    save_dir: str | Path,
    project: str = "lit_rlhf",
    continues: str | Path | None = None,
    log_model: LogModel = False,
    **kwargs: Any,
) -> WandbLogger:
    """A W&B logger that needs no account: online where the user is logged in, offline otherwise.

    `WANDB_MODE` decides where it is set. The offline run lies in `save_dir`; `wandb sync` uploads it.

    Args:
        save_dir: folder of the run.
        project: W&B project.
        continues: a checkpoint in the `checkpoints/` of a run folder; the W&B run of that folder goes on.
        log_model: True: what the run exports at its end, `model/` and `adapter/`, becomes a W&B artifact; `"all"`:
            every checkpoint, too, when it is written.
        **kwargs: passed to `lightning.pytorch.loggers.WandbLogger`.

    Raises:
        InputError: `log_model` is something else.
    """
    check_log_model(log_model)
    os.environ.setdefault("WANDB_SILENT", "true")
    if "WANDB_MODE" not in os.environ and not logged_in():
        os.environ["WANDB_MODE"] = "offline"  # before wandb is first imported, which reads it
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    folder = None if continues is None else Path(continues).resolve().parent
    if folder is not None and folder.name == "checkpoints" and (found := _run_id(folder.parent)):
        kwargs = {"id": found, "resume": "allow", **kwargs}
    logger = RolloutWandbLogger(logs_model=log_model, project=project, save_dir=save_dir, **kwargs)
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes it, and wandb warns that it means nothing
    return logger


class RolloutWandbLogger(WandbLogger):
    """Lightning's, with rollouts on the x-axis of what is measured per rollout, and best values in the summary.

    The configuration has the versions of the code under `environment`. Lightning's own `log_model`, which knows neither
    exported models nor folders of shards, and nothing of offline runs, is left alone.
    """

    def __init__(self, *, logs_model: LogModel = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.logs_model = logs_model
        self._logged_at: dict[str, int] = {}  # global step of the newest artifact of a checkpoint, by name

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
            run.config.update({"environment": versions()}, allow_val_change=True)  # a run that goes on may have others
        return run

    @rank_zero_only
    def log_exported(self, folder: Path) -> None:
        """Make a folder that the run has exported an artifact, `NAME-RUN_ID`, where `log_model` asks for it.

        W&B uploads it from where it lies: an offline run holds no second copy.
        """
        if self.logs_model:
            self._log_artifact(folder.name, folder, policy="immutable")

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Make a checkpoint an artifact where `log_model` is "all": a copy, for the file is overwritten.

        `checkpoint-RUN_ID` is the newest, and `best-RUN_ID` that of a callback which keeps the best.
        """
        name = "checkpoint" if checkpoint_callback.monitor is None else "best"
        step = checkpoint_callback._last_global_step_saved
        if self.logs_model == "all" and self._logged_at.get(name) != step:  # one step is saved under two names
            self._logged_at[name] = step
            self._log_artifact(name, Path(checkpoint_callback._last_checkpoint_saved), policy="mutable")

    def _log_artifact(self, name: str, path: Path, policy: Literal["mutable", "immutable"]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{name}-{self.experiment.id}", type="model")
        if path.is_dir():
            artifact.add_dir(str(path), policy=policy)
        else:
            artifact.add_file(str(path), f"{name}.ckpt", policy=policy)
        self.experiment.log_artifact(artifact)


def _run_id(run_folder: Path) -> str | None:
    """The id of the newest W&B run in the folder, from the name that W&B gives its files."""
    names = sorted(folder.name.removeprefix("offline-") for folder in run_folder.glob("wandb/*run-*"))
    found = [match[1] for name in names if (match := re.fullmatch(r"run-\d{8}_\d{6}-(.+)", name))]
    return found[-1] if found else None


def logged_in() -> bool:
    """Whether there is a key, where `wandb login` and the environment leave it; asks nobody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

"""One job of a sweep (`-m`): the name of its folder, and what becomes of the others when it fails or is stopped."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lit_rlhf.config import quoted
from lit_rlhf.monitoring.comparison import FAILED
from lit_rlhf.subprocesses import INTERRUPTED, run_module

_OF_THE_SWEEP = ("hydra.mode=", "hydra.sweep.", "hydra.sweeper", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
_JOB = "LIT_RLHF_SWEEP_JOB"  # in the environment of a sweep's runs
_LONGEST = 150  # characters of a folder's name; most file systems take 255


def named(arguments: Sequence[str]) -> list[str]:
    """What to add to the arguments of a sweep for folders named `algo=grpo,seed=1`, unless the user names them.

    They are named after what is swept, and where nothing is, after all that is given.
    """
    if not {"-m", "--multirun"} & {*arguments} or any(a.startswith("hydra.sweep.subdir=") for a in arguments):
        return []
    parser = OverridesParser.create()
    overrides = [parser.parse_override(a) for a in arguments if "=" in a and not a.startswith("-")]
    ours = [o for o in overrides if not re.match(r"hydra\b|ckpt_path$", o.key_or_group)]  # ckpt_path=last goes on
    named_after = [o for o in ours if o.is_sweep_override()] or ours
    swept = [f"'{override.key_or_group}'" for override in named_after]
    return [f"hydra.sweep.subdir=${{job_name:{','.join(swept)}}}"] if swept else []


def job_name(*swept: str, _root_: DictConfig) -> str:
    """The overrides of a job that differ from its neighbours', without what a folder's name may not have."""
    given = [str(override).lstrip("+") for override in _root_.hydra.overrides.task]
    name = ",".join(override for key in swept for override in given if override.partition("=")[0] == key)
    kept = re.sub(r"[^\w.,=+\-]+", "_", name)[:_LONGEST]
    return kept if kept == name else f"{kept},{_root_.hydra.job.num}"  # two may have become the same


OmegaConf.register_new_resolver("job_name", job_name, replace=True)


def is_one() -> bool:
    """Whether this is a run of a sweep that compares its runs, which are processes of their own."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN and _compared())


def _compared() -> bool:
    """Whether this entry point's runs are."""
    return "sweep" in (HydraConfig.get().callbacks or {})


def run(module: str, arguments: Sequence[str]) -> None:
    """Run one job to its end; where it fails it says why, and the sweep goes on to the next.

    Where the very first fails before it has logged anything, the others would too, and the sweep ends as a single run
    does; it also ends where it is interrupted.

    Args:
        module: the entry point.
        arguments: of the whole sweep.

    Raises:
        SystemExit: the sweep ends.
    """
    own = HydraConfig.get()
    folder = Path(own.runtime.output_dir)
    flags = [a for before, a in zip(["", *arguments], arguments, strict=False) if _is_flag(a) or _takes_value(before)]
    hydras = [o for o in own.overrides.hydra if not o.startswith(_OF_THE_SWEEP)]
    given = [*flags, *own.overrides.task, *hydras, f"hydra.run.dir={quoted(str(folder))}"]
    code = run_module(
        [module, *given], {_JOB: "1", "WANDB_RUN_GROUP": Path(own.sweep.dir).name, "WANDB_NAME": folder.name}
    )
    if code in INTERRUPTED:
        again = f"the same command with hydra.sweep.dir={own.sweep.dir} ckpt_path=last goes on"
        print(f"{again}; python -m lit_rlhf.compare {own.sweep.dir} compares what there is", file=sys.stderr)
    if code in INTERRUPTED or (code and own.job.num == 0 and not (folder / "metrics.csv").exists()):
        sys.exit(code if code > 0 else 128 - code)
    if code < 0:
        print(f"error: the run was ended by {signal.Signals(-code).name}", file=sys.stderr)
    if code and not (folder / FAILED).exists():
        note_failure(f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}")


def begin() -> None:
    """Take back what an earlier attempt in this folder has noted."""
    if _compared():
        Path(HydraConfig.get().runtime.output_dir, FAILED).unlink(missing_ok=True)


def note_failure(says: str) -> None:
    """Leave word in the run's folder of why it has no end, and of what it was, for whoever compares runs."""
    own = HydraConfig.get()
    folder = Path(own.runtime.output_dir)
    of_a_sweep = own.mode == RunMode.MULTIRUN or _JOB in os.environ
    if _compared() and (of_a_sweep or (folder / "config").exists()):  # a single run that is refused leaves nothing
        with suppress(OSError):
            (folder / FAILED).write_text(says + "\n", encoding="utf-8")
            overrides = folder / "config" / "overrides.yaml"
            if not overrides.exists():  # it came to its end before it has written them itself
                overrides.parent.mkdir(exist_ok=True)
                overrides.write_text(OmegaConf.to_yaml(own.overrides.task), encoding="utf-8")


def _is_flag(argument: str) -> bool:
    return argument.startswith("-") and argument not in ("-m", "--multirun")


def _takes_value(argument: str) -> bool:
    return argument in ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")

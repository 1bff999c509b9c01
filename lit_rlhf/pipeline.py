"""From raw data to a policy in three stages: `python -m lit_rlhf.pipeline`.

    sft             demonstrations -> a policy
    reward_model    pairs          -> a judge, made from that policy
    policy          prompts        -> the policy that the judge prefers, held near the first by a KL

as in Stiennon et al. (arXiv 2009.01325) and Ouyang et al. (2203.02155). Each stage is an ordinary run of
`python -m lit_rlhf.train`, in a process and a folder of its own. Given the folder of an earlier pipeline, the stages
that are finished there are not run again, and one that was stopped goes on.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from lit_rlhf import cli
from lit_rlhf.confidential import check_no_secrets
from lit_rlhf.config import nearest, prepare_arguments, quoted
from lit_rlhf.durable import standing
from lit_rlhf.errors import InputError
from lit_rlhf.failing import fail
from lit_rlhf.stage_results import draw, results_of, table
from lit_rlhf.stages import STAGES, Stage, plan, split_arguments
from lit_rlhf.subprocesses import INTERRUPTED, run_module
from lit_rlhf.train import check_run as check_training


def run_stages(stages: Sequence[Stage]) -> dict[str, Any]:
    """Run what is not finished yet, one stage after the other.

    Returns:
        Of each stage what `results_of` says.

    Raises:
        InputError: a stage failed, or was made from a former one.
    """
    for number, stage in enumerate(stages, 1):
        title = f"stage {number} of {len(stages)}, {stage.name}"
        if stage.finished:
            print(f"{title}: finished before, in {stage.folder}", flush=True)
            continue
        for later in stages[number:]:
            if later.folder.exists():
                raise InputError(f"{later.folder} was made from a former stage {stage.name}; remove it to go on")
        print(f"{title}: {shlex.join(_command(stage))}", flush=True)
        _run(stage)
    return results_of(stages)


def _command(stage: Stage) -> list[str]:
    resumed = [f"ckpt_path={stage.checkpoint}"] if standing(stage.checkpoint).exists() else []
    return ["python", "-m", "lit_rlhf.train", *stage.arguments, f"hydra.run.dir={quoted(str(stage.folder))}", *resumed]


def _run(stage: Stage) -> None:
    """One stage in a process of its own: it may start others, one per device, and leaves no memory behind.

    Raises:
        InputError: it failed, or was stopped, or has left no model.
    """
    stage.note(0.0, finished=False)
    command, started = _command(stage), time.monotonic()
    own = {"WANDB_RUN_GROUP": stage.folder.parent.name, "WANDB_NAME": stage.name}
    code = run_module(command[2:], own)
    made = code == 0 and (stage.model / "config.json").is_file()
    stage.note(time.monotonic() - started, finished=made)
    if code:
        how = "begins that stage anew" if not stage.checkpoint.exists() else "goes on from its last checkpoint"
        again = f"the same command with hydra.run.dir={stage.folder.parent} {how}"
        what = f"failed with exit code {code}" if code not in (*INTERRUPTED, -signal.SIGKILL) else "was stopped"
        raise InputError(
            f"the stage {stage.name} {what}; {'mend what it says above, and ' if code == 2 else ''}{again}"
        )
    if not made:
        raise InputError(
            f"the stage {stage.name} has left no model in {stage.model}; its callbacks need an export, with adapters "
            "merged, and its folder has to be removed to run it again"
        )


def check_choices(config: Mapping[str, Any]) -> None:
    """Refuse a key under `pipeline` that is no stage."""
    for key in config["pipeline"]:
        if key not in STAGES:
            raise InputError(f"unknown key 'pipeline.{key}'{nearest(str(key), STAGES)}")


def check_stage(stage: Stage) -> None:
    """Check a stage's command line, as `train` would, before anything is run."""
    try:
        overrides = prepare_arguments(stage.arguments, cli.primary("train"))
        if swept := [override for override in overrides if "=" in override and cli.sweeps(override)]:
            raise InputError(f"{swept[0].lstrip('+')} are several values; only the choices of pipeline can be swept")
        cli.check_grammar(overrides)
        plain: Any = OmegaConf.to_container(compose("train", overrides), resolve=False)
        check_no_secrets(plain)
        check_training(plain)
        if plain["dry_run"]:
            raise InputError(
                "dry_run=true would leave no model for the next stage; python -m lit_rlhf.train algo=... dry_run=true "
                "shows one stage's plan"
            )
        for key in ("path", "validation_path"):
            file = Path(str(plain["data"].get(key) or ".")).expanduser()
            if (file.suffix or file.is_absolute()) and not file.exists():
                raise InputError(f"data.{key}={file} does not exist")
    except InputError as error:
        raise InputError(f"in the stage {stage.name}: {error}") from None


def _pipeline(cfg: DictConfig, shared: Sequence[str], of_stage: Mapping[str, Sequence[str]]) -> None:
    folder = Path(cli.run_folder())
    stages = plan(cfg.pipeline, shared, of_stage, folder)
    for stage in stages:
        check_stage(stage)
    cli.save_config(cfg, folder)
    results = run_stages(stages)
    (folder / "pipeline.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    try:
        draw(stages, folder / "pipeline.png")
    except ImportError:
        print("no figure: it needs the package matplotlib: pip install 'lit_rlhf[plots]'")
    print(folder)


def main() -> None:
    """Entry point of `python -m lit_rlhf.pipeline`."""
    try:
        sys.argv[1:], shared, of_stage = split_arguments(sys.argv[1:])
    except InputError as error:
        fail(str(error))
    cli.main("pipeline", check_choices, lambda cfg: _pipeline(cfg, shared, of_stage), __doc__)


if __name__ == "__main__":
    main()

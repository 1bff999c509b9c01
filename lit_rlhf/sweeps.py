"""What `python -m lit_rlhf.train -m ...` does around its runs: check their keys, name each, compare them at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from lit_rlhf.compare import compare
from lit_rlhf.confidential import check_no_secrets
from lit_rlhf.errors import InputError
from lit_rlhf.failing import fail
from lit_rlhf.train import check_run


class Sweep(Callback):  # type: ignore[misc]
    """Hydra's callback in `conf/train.yaml`.

    A mistake in the keys, choices or types of any of the runs is told before the first begins. One that fails later is
    named in the comparison, and the others are run.
    """

    def __init__(self) -> None:
        self.count: int | None = None  # of runs; a sweeper of the user's own does not say

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check keys, choices and types of every run, which takes a moment, before any of them is begun."""
        if not config.hydra.sweeper._target_.endswith(BasicSweeper.__name__):
            return
        loader = GlobalHydra.instance().config_loader()
        overrides = OverridesParser.create(loader).parse_overrides([*config.hydra.overrides.task])
        jobs = [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
        self.count = len(jobs)
        for job in jobs:
            if said := _mistake(loader, config, job):
                fail(f"in the run {' '.join(o.lstrip('+') for o in job)}: {said}" if len(jobs) > 1 else said)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Say which run begins."""
        if self.count is not None:
            name = Path(config.hydra.runtime.output_dir).name
            print(f"\nrun {config.hydra.job.num + 1} of {self.count}: {name}", flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the comparison; the process ends with code 1 if a run has failed."""
        if config.dry_run:
            return
        folder = Path(config.hydra.sweep.dir).resolve()
        compared = compare([folder], folder)
        print(folder, flush=True)
        if compared.failed:
            sys.exit(1)


def _mistake(loader: Any, config: DictConfig, job: Sequence[str]) -> str | None:
    """What the overrides of one run have wrong."""
    try:
        composed = loader.load_sweep_config(config, job)
        with open_dict(composed):
            del composed["hydra"]
        plain: Any = OmegaConf.to_container(composed, resolve=False)
        check_no_secrets(plain)
        check_run(plain)
    except HydraException as error:
        return str(error).partition("\n")[0]  # below it are the folders that Hydra has looked in
    except InputError as error:
        return str(error)
    return None

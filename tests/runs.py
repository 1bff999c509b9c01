"""Runs of the command line for the tests: composed in this process, forked from it, or in a new one."""

import csv
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

import lit_rlhf
from lit_rlhf.cli import primary
from lit_rlhf.config import conf_dir, prepare_arguments
from lit_rlhf.train import main

QUIET = ("callbacks.progress=null", "logger.wandb=null")


def config_of(*arguments, folder="."):
    """What `python -m lit_rlhf.train *arguments` would hand to `train`, with `folder` as the run's."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", prepare_arguments(arguments, primary("train")), return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(config)
        del config["hydra"]
    return config


@dataclass
class Finished:
    """How a run ended."""

    code: int
    out: str
    err: str

    def sentence(self):
        """What the run said about a mistake of the user's: one sentence, the last thing on stderr, exit code 2."""
        assert self.code == 2, (self.code, self.err)
        assert "Traceback" not in self.err, self.err
        lines = self.err.strip().splitlines()
        assert [i for i, line in enumerate(lines) if line.startswith("error: ")] == [len(lines) - 1], self.err
        return lines[-1].removeprefix("error: ")


def new_process(*arguments, cwd, command=("-m", "lit_rlhf.train"), **environment):
    """Run the command in a process of its own, as a user without an account would."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env = {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NETRC": os.devnull, **environment}
    ended = subprocess.run([sys.executable, *command, *arguments], cwd=cwd, env=env, capture_output=True, timeout=120)
    return Finished(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def fork(*arguments, cwd, main=main, seconds=120):
    """Run an entry point in a fork of this process, which pays for the imports once; a hang is killed and told."""
    _import_everything()
    out, err = Path(cwd, ".out"), Path(cwd, ".err")
    process = multiprocessing.get_context("fork").Process(target=_forked, args=(main, arguments, cwd, out, err))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(err.read_text())
    return Finished(process.exitcode, out.read_text(), err.read_text())


@cache
def _import_everything():
    from lit_rlhf.data.modules import ArithmeticData
    from lit_rlhf.models.loading import load_causal_lm, load_tokenizer

    for name in set(lit_rlhf.__all__):
        getattr(lit_rlhf, name)
    load_causal_lm(), load_tokenizer(), ArithmeticData()


def _forked(main, arguments, cwd, out, err):
    os.chdir(cwd)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    GlobalHydra.instance().clear()
    sys.argv = ["lit-rlhf", *arguments]
    main()


def metrics_of(folder):
    """The rows of a run's `metrics.csv`, as numbers, without what was not logged."""
    with Path(folder, "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]

"""Rollouts sampled ahead of their turn (`rollout.max_staleness`): wall clock of a step, and what learning loses by it.

    python benchmarks/async_rollouts.py [--threads 2] [--turns 5] [--steps 4] [--staleness 1] [--only W2]
    python benchmarks/async_rollouts.py --learning [--algos grpo dapo] [--seeds 1 2 3] [--staleness 1]

The first trains a workload of vs_trl.py synchronously and asynchronously in turns, in one process, and prints seconds
per step, medians, and the median of the turns' ratios. A turn's first step, which nothing is sampled ahead for, is not
counted. The second trains on the built-in task, each run the command a user types in a process of its own, and prints
the sampled accuracy on held-out problems by rollout.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it; before torch is imported

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from learning_curves import run
from lightning.pytorch import Callback, Trainer
from side_ours import build_module, build_trainer
from workloads import WORKLOADS, build_rows, reward_of

from lit_rlhf.data import RowsDataModule
from lit_rlhf.types import SamplingConfig


class Clock(Callback):
    """When every rollout's update began, and how long its samples were waited for."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.waited: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """The first micro-batch of a rollout follows its collection."""
        if batch_idx == 0:
            self.at.append(time.perf_counter())
            self.waited.append(module.clock["wait"])


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward_of(ids) for ids in completion_ids]


def seconds_per_step(name: str, staleness: int, steps: int) -> tuple[float, float]:
    """Of a step after the first, and of it those spent waiting for samples."""
    work, clock = WORKLOADS[name], Clock()
    sampling = SamplingConfig(work.new_tokens, max_staleness=staleness)
    module = build_module(work, reward_funcs=[reward], sampling=sampling)
    build_trainer(clock, max_epochs=steps + 2).fit(module, datamodule=RowsDataModule(build_rows(work)))
    taken = [after - before for before, after in zip(clock.at[1:], clock.at[2:], strict=False)]
    return mean(taken), mean(clock.waited[2:])


def speed(arguments: argparse.Namespace) -> None:
    """Steps of both kinds in turns."""
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    arms = (0, arguments.staleness)
    found: dict[int, list[tuple[float, float]]] = {k: [] for k in arms}
    for turn in range(arguments.turns):
        for k in arms if turn % 2 == 0 else arms[::-1]:
            found[k].append(seconds_per_step(arguments.only, k, arguments.steps))
            print(f"max_staleness={k}: {found[k][-1][0]:.2f} s per step", file=sys.stderr, flush=True)
    print(f"{arguments.only}, {arguments.threads} threads, torch {torch.__version__}, {arguments.turns} turns\n")
    print("| max_staleness | seconds per step | of them waiting | synchronous / this |\n|---|---|---|---|")
    for k, times in found.items():
        ratio = median(sync / this for (sync, _), (this, _) in zip(found[0], times, strict=True))
        step, wait = (median(column) for column in zip(*times, strict=True))
        print(f"| {k} | {step:.2f} | {wait:.2f} | {ratio:.2f} |")


def learning(arguments: argparse.Namespace) -> None:
    """Accuracy by rollout, seeds side by side."""
    base = arguments.folder or Path(tempfile.mkdtemp())
    for algo in arguments.algos:
        print(f"\n| {algo}, max_staleness | sampled accuracy by optimiser step, mean of seeds | at the end, by seed |")
        print("|---|---|---|")
        for k in (0, arguments.staleness):
            own = [f"algo={algo}", f"rollout.max_staleness={k}"]
            curves = [run([*own, f"seed={s}"], base / f"{algo}_{k}_{s}")["curve"] for s in arguments.seeds]
            accuracy = [points["accuracy_sampled"] for points in curves]
            means = [f"{mean(values):.3f}" for values in zip(*accuracy, strict=True)]
            by_step = ", ".join(f"{step}: {value}" for step, value in zip(curves[0]["step"], means, strict=True))
            print(f"| {k} | {by_step} | {' '.join(f'{values[-1]:.3f}' for values in accuracy)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--only", default="W2")
    parser.add_argument("--learning", action="store_true")
    parser.add_argument("--algos", nargs="+", default=["grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here")
    arguments = parser.parse_args()
    learning(arguments) if arguments.learning else speed(arguments)


if __name__ == "__main__":
    main()

"""What a step of training costs beside its arithmetic: our metrics and logging, and Lightning.

    python benchmarks/overhead.py [--only W1 W2] [--steps 8] [--threads 2] [--stories FOLDER]

Trains a workload of vs_trl.py as a user does, with a CSV logger, and times every part of the steps by wrapping the
functions that do it: what counts, reduces and logs metrics (the gradient's norm included), the rollout, forward,
backward, optimiser and clipping. What is left of the fit's time is Lightning's own and that of the loop.

The entropy of every token is a metric, too, and computed within the forward pass; the last column is the median, over
pairs of steps in turns, of what the update saves without it (`algo.entropy=none`).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import side_ours
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from stopwatch import Stopwatch
from workloads import WORKLOADS, Workload, build_rows, reward_of, with_stories

from lit_rlhf.algorithms import on_policy
from lit_rlhf.algorithms.base import RLHFModule
from lit_rlhf.data import RowsDataModule
from lit_rlhf.metrics import MaskedStats

LIGHTNING = "lightning"
SECTIONS = ("rollout", "forward", "backward", "optimizer", "metrics", LIGHTNING)
WARM_UP = 2
METRICS = {  # where metrics are computed, counted and logged
    on_policy: (
        *("sample_stats", "count_rewards", "rollout_stats", "update_stats", "loss_stats", "tell", "explained"),
        "warn_of_no_rewards",
    ),
    RLHFModule: ("count", "publish", "pop_metrics", "on_before_optimizer_step"),
    MaskedStats: ("update", "compute", "extend"),
    CSVLogger: ("log_metrics", "save"),
}


class Timed(Callback):
    """Starts the stopwatch after the warm-up, and collects the update's time of every step by its kind."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.updates: dict[str, list[float]] = {"full": [], "none": []}

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        """A step begins; in the second half of the run every other one does without the entropy."""
        if trainer.current_epoch == WARM_UP:
            self.watch.start()
        if trainer.current_epoch == trainer.max_epochs // 2:
            self.sections = self.watch.read()
        if trainer.current_epoch >= trainer.max_epochs // 2:
            module.entropy = "none" if trainer.current_epoch % 2 else "full"

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """A step has ended."""
        if trainer.current_epoch >= trainer.max_epochs // 2:
            self.updates[module.entropy].append(module.clock["update"])


def instrument(watch: Stopwatch, module: Any) -> None:
    """Wrap everything that a step consists of."""
    for owner, names in METRICS.items():
        for name in names:
            watch.wrap(owner, name, "metrics")
    watch.wrap(module, "collect", "rollout")
    watch.wrap(module, "training_step", "forward")
    watch.wrap(module, "backward", "backward")
    watch.wrap(module, "configure_gradient_clipping", "optimizer")
    step = torch.optim.AdamW.step

    def timed(self: Any, closure: Any = None) -> Any:
        def run() -> Any:
            with watch.section(LIGHTNING):
                return closure()

        with watch.section("optimizer"):
            return step(self, run)

    torch.optim.AdamW.step = timed


def measure(work: Workload, steps: int) -> tuple[dict[str, float], list[float]]:
    """Milliseconds of a step by section, and those that every second update without entropies saves."""

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [reward_of(ids) for ids in completion_ids]

    watch = Stopwatch(LIGHTNING)
    callback, module = Timed(watch), side_ours.build_module(work, reward_funcs=[reward])
    original = {(owner, name): getattr(owner, name) for owner, names in METRICS.items() for name in names}
    original[torch.optim.AdamW, "step"] = torch.optim.AdamW.step
    instrument(watch, module)
    with tempfile.TemporaryDirectory() as folder:
        epochs = 2 * (steps + WARM_UP)
        trainer = side_ours.build_trainer(
            callback, max_epochs=epochs, logger=CSVLogger(folder, flush_logs_every_n_steps=1), log_every_n_steps=1
        )
        trainer.fit(module, datamodule=RowsDataModule(build_rows(work)))
    for (owner, name), function in original.items():
        setattr(owner, name, function)
    saved = [a - b for a, b in zip(callback.updates["full"], callback.updates["none"], strict=True)]
    return {name: 1e3 * callback.sections[name] / steps for name in SECTIONS}, [1e3 * s for s in saved]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[n for n, w in WORKLOADS.items() if w.samples], default=["W2"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stories", type=Path, default=None, help="stories260k's folder, for W1")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"milliseconds of a step, mean of {arguments.steps}, {arguments.threads} threads, CPU\n")
    print(f"|    | {' | '.join(SECTIONS)} | metrics, share | lightning, share | entropy |")
    print(f"|----|{'---|' * (len(SECTIONS) + 3)}")
    for name in arguments.only:
        found, saved = measure(with_stories(WORKLOADS[name], arguments.stories), arguments.steps)
        total = sum(found.values())
        cells = [f"{found[section]:.1f}" for section in SECTIONS]
        cells += [f"{found[section] / total:.2%}" for section in ("metrics", LIGHTNING)]
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(saved):.0f} |", flush=True)


if __name__ == "__main__":
    main()

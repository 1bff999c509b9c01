"""What the curriculum saves: completions sampled until a held-out accuracy, with it and without.

    python benchmarks/curriculum.py

Each run is `python -m lit_rlhf.train algo=grpo seed=N` with the arguments of `TASKS` and `CURRICULA` below, in a
process of its own, one after the other. The mixed task trains on problems of 1 to 4 digits, of which the built-in model
gets those of 3 and 4 never right and those of 2 right half of the time, and validates on those of 2; the single task is
the default one. The runs are added to those in `docs/curriculum.json`, in place of earlier ones of the same name and
seed; with --missing only what is not recorded yet is run, and with --read nothing. Completions are counted up to the
first validation, every ten rollouts, that reaches the accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from learning_curves import ROOT, column, run

TASKS = {
    "mixed": ["data.difficulty=[1,2,3,4]", "data.train_size=[90,2000,2000,2000]", "data.held_out=[0,256,0,0]"],
    "single": ["data.held_out=256"],
}
CURRICULA = {
    "uniform": [],
    "success_rate": ["algo.curriculum=success_rate"],
    "success_rate, levels": ["algo.curriculum=success_rate", "algo.curriculum_level=difficulty"],
}
RUNS = [(t, c) for t in TASKS for c in CURRICULA if not (t == "single" and "levels" in c)]
USUAL = ["algo=grpo", "trainer.max_epochs=160", "trainer.check_val_every_n_epoch=10", "logger.wandb=null"]
COMPLETIONS = 4 * 64  # of a rollout, for as many optimiser steps as it has minibatches, 4
ACCURACIES = (0.7, 0.75, 0.8)


def record(task: str, curriculum: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train once: the curve of held-out accuracy over completions, and the share of groups without a signal."""
    found = run([*USUAL, *TASKS[task], *CURRICULA[curriculum], f"seed={seed}"], folder)
    curve = found.pop("curve")
    samples = [step // 4 * COMPLETIONS for step in curve["step"]]
    idle = column(folder, "reward/zero_std_fraction")
    share = round(sum(idle) / len(idle), 4)
    return {**found, "completions": samples, "accuracy": curve["accuracy_sampled"], "zero_std_fraction": share}


def reached(found: dict[str, Any], accuracy: float) -> int | None:
    """Completions sampled when a validation first found this accuracy; None if none did."""
    points = zip(found["completions"], found["accuracy"], strict=True)
    return next((samples for samples, value in points if value >= accuracy), None)


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per task and curriculum: completions to every accuracy, in thousands, median and by seed."""
    heads = [f"to {accuracy}" for accuracy in ACCURACIES]
    lines = [
        f"| task | prompts drawn | {' | '.join(heads)} | after {160 * COMPLETIONS / 1000:.1f} | groups without signal |"
    ]
    lines.append("|---" * (len(heads) + 4) + "|")
    for name, seeds in results.items():
        cells = name.split(": ")
        for accuracy in ACCURACIES:
            counts = [reached(found, accuracy) for found in seeds.values()]
            median = statistics.median(float("inf") if n is None else n for n in counts)
            shown = " ".join("-" if n is None else f"{n / 1000:.1f}" for n in counts)
            cells.append(f"{'-' if median == float('inf') else f'{median / 1000:.1f}'} ({shown})")
        cells.append(" ".join(f"{found['accuracy'][-1]:.3f}" for found in seeds.values()))
        cells.append(f"{statistics.mean(found['zero_std_fraction'] for found in seeds.values()):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--missing", action="store_true", help="run only what is not recorded yet")
    parser.add_argument("--read", action="store_true", help="print what is recorded, run nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "curriculum.json")
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp())
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for task in [] if arguments.read else arguments.tasks:
        for seed, curriculum in product(arguments.seeds, [c for t, c in RUNS if t == task]):
            name = f"{task}: {curriculum}"
            if arguments.missing and str(seed) in results.get(name, {}):
                continue
            found = record(task, curriculum, seed, base / f"{task}_{list(CURRICULA).index(curriculum)}_{seed}")
            results.setdefault(name, {})[str(seed)] = found
            arguments.results.write_text(json.dumps(results) + "\n")
            print(table({name: {str(seed): found}}).splitlines()[-1], file=sys.stderr, flush=True)
    print(table({f"{t}: {c}": results[f"{t}: {c}"] for t, c in RUNS if f"{t}: {c}" in results}))


if __name__ == "__main__":
    main()

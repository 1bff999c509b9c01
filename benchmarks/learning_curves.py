"""The main job, timed: sampled accuracy on held-out problems over the wall clock, per algorithm and seed.

    python benchmarks/learning_curves.py --seeds 1 2 3

Each run is the command a user types, `python -m lit_rlhf.train algo=NAME seed=N`, in a process of its own, one after
the other; seconds count from the command to its end, start-up included. Writes a table to the terminal and
`docs/learning_curves.png`. With --read FOLDER it draws runs made before.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLORS = {"grpo": "#4477AA", "dapo": "#CC6677"}


def run(algo: str, seed: int, folder: Path) -> float:
    command = [sys.executable, "-m", "lit_rlhf.train", f"algo={algo}", f"seed={seed}", f"hydra.run.dir={folder}"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    seconds = time.perf_counter() - started
    (folder / "seconds.txt").write_text(f"{seconds:.1f}\n")
    return seconds


def curve(folder: Path) -> tuple[list[int], list[float], list[float]]:
    """Rollouts, sampled and greedy accuracy of every validation of a run."""
    rollouts, sampled, greedy, done = [], [], [], 0
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row["val/accuracy_sampled"]:
                rollouts.append(int(row["step"]))
                sampled.append(float(row["val/accuracy_sampled"]))
                greedy.append(float(row["val/accuracy_greedy"]))
            if row["rollout/iteration"]:
                done = int(float(row["rollout/iteration"]))
    last = max(rollouts)
    return [round(step * done / last) for step in rollouts], sampled, greedy


def draw(runs: dict[tuple[str, int], Path], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=150)
    for (algo, seed), folder in runs.items():
        rollouts, sampled, _ = curve(folder)
        first = seed == min(s for a, s in runs if a == algo)
        axes.plot(rollouts, sampled, color=COLORS[algo], alpha=0.85, lw=1.6, label=algo.upper() if first else None)
    axes.axhline(0.9, color="0.6", lw=0.8, ls="--")
    axes.text(2, 0.905, "0.90", color="0.4", fontsize=8, va="bottom")
    axes.set(
        xlabel="rollouts (256 completions each)",
        ylabel="sampled accuracy, held-out problems",
        ylim=(0.4, 1.0),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title("The built-in task, one line per seed", fontsize=10, loc="left")
    figure.tight_layout()
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", default=["grpo", "dapo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here")
    parser.add_argument("--read", action="store_true", help="draw the runs in --folder, run nothing")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "learning_curves.png")
    arguments = parser.parse_args()
    base = arguments.folder or Path(tempfile.mkdtemp())
    runs = {(algo, seed): base / f"{algo}_{seed}" for algo in arguments.algos for seed in arguments.seeds}
    print(
        "| algorithm | seed | sampled accuracy, before | after | greedy, after | seconds |\n|---|---|---|---|---|---|"
    )
    for (algo, seed), folder in runs.items():
        seconds = float((folder / "seconds.txt").read_text()) if arguments.read else run(algo, seed, folder)
        _, sampled, greedy = curve(folder)
        print(
            f"| {algo} | {seed} | {sampled[0]:.3f} | {sampled[-1]:.3f} | {greedy[-1]:.3f} | {seconds:.0f} |", flush=True
        )
    draw(runs, arguments.figure)


if __name__ == "__main__":
    main()

"""The main job of every algorithm, timed: held-out accuracy over the run, per algorithm and seed.

    python benchmarks/learning_curves.py
    python benchmarks/learning_curves.py --algos ppo rloo --seeds 1 2 3

Each run is the command a user types, `python -m lit_rlhf.train algo=NAME seed=N`, in a process of its own, one after
the other; seconds count from the command to its end, start-up included, and beside them those of processor time,
which other work on the machine changes less. The runs are added to those in
`docs/learning_curves.json`, in place of earlier ones of the same algorithm and seed; all of them are then drawn to
`docs/learning_curves.png` and printed as a table. With --missing only what is not recorded yet is run, and with --read
nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAIRS = "#AA7733"
FAMILIES = {
    "grpo dapo dr_grpo gspo cispo": "#4477AA",
    "ppo conservative_ppo": "#CC6677",
    "rloo reinforce reinforce_pp remax importance_sampling": "#228833",
    "dpo ipo hinge_dpo robust_dpo reward_modeling": PAIRS,
}
COLORS = {algo: color for algos, color in FAMILIES.items() for algo in algos.split()}
MEASURES = ("accuracy_sampled", "accuracy_greedy", "preference_accuracy")


def run(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train in a process of its own.

    Args:
        arguments: of `python -m lit_rlhf.train`.
        folder: of the run.

    Returns:
        `seconds` and `cpu_seconds` of the process, and its `curve`.
    """
    command = [sys.executable, "-m", "lit_rlhf.train", *arguments, f"hydra.run.dir={folder}"]
    started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    seconds, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{found.stdout[-2000:]}")
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "curve": curve(folder)}


def column(folder: Path, name: str) -> list[float]:
    """The values of a metric over a run, without the lines that lack it."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def curve(folder: Path) -> dict[str, list[float]]:
    """Optimiser step and the `MEASURES` of every validation of a run."""
    points: dict[str, list[float]] = {"step": []}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found = {name: float(row[f"val/{name}"]) for name in MEASURES if row.get(f"val/{name}")}
            if found:
                points["step"].append(int(row["step"]))
                for name, value in found.items():
                    points.setdefault(name, []).append(round(value, 4))
    return points


def measure_of(points: dict[str, list[float]]) -> str:
    """What a run is judged by: sampled accuracy, or that of preferences for what does not generate."""
    return next(name for name in ("accuracy_sampled", "preference_accuracy") if name in points)


def draw(results: dict[str, dict[str, Any]], target: Path) -> None:
    """One panel per algorithm, one line per seed, the vertical axis shared."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(6, len(results))
    rows = -(-len(results) // columns)
    size = (2.0 * columns + 0.6, 1.9 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=150, sharey=True, squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, (algo, seeds) in zip(axes.flat, results.items(), strict=False):
        for found in seeds.values():
            points = found["curve"]
            axis.plot(points["step"], points[measure_of(points)], color=COLORS.get(algo, "0.3"), alpha=0.8, lw=1.4)
        title = algo if measure_of(points) == "accuracy_sampled" else f"{algo} (pairs)"
        axis.set_title(title, fontsize=9, loc="left")
        if COLORS.get(algo) != PAIRS:
            axis.axhline(0.85, color="0.6", lw=0.7, ls="--")
        axis.set(ylim=(0.4, 1.0), yticks=(0.4, 0.6, 0.8, 1.0))
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("optimiser steps", fontsize=9)
    figure.supylabel("sampled accuracy, held out", fontsize=9)
    figure.tight_layout()
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table of docs/algorithms.md: one row per algorithm, its seeds side by side."""
    lines = [
        "| algorithm | sampled accuracy, before | after, by seed | greedy, after | on pairs, after | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for algo, seeds in results.items():
        curves = [found["curve"] for found in seeds.values()]
        cells = [algo, _joined(curves, "accuracy_sampled", 0, once=True), _joined(curves, "accuracy_sampled", -1)]
        cells += [_joined(curves, name, -1) for name in ("accuracy_greedy", "preference_accuracy")]
        used = [found["cpu_seconds"] for found in seeds.values()]
        lines.append(f"| {' | '.join(cells)} | {min(used):.0f} to {max(used):.0f} |")
    return "\n".join(lines)


def _joined(curves: Sequence[dict[str, list[float]]], name: str, at: int, once: bool = False) -> str:
    """The values of a measure at one end of the curves."""
    values = [f"{points[name][at]:.3f}" for points in curves if name in points]
    return " ".join(values[:1] if once else values) or "-"


def ordered(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By family, then by seed; algorithms of no family come last."""
    known = [*COLORS, *sorted(set(results) - set(COLORS))]
    return {algo: dict(sorted(results[algo].items())) for algo in known if algo in results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", default=list(COLORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here")
    parser.add_argument("--missing", action="store_true", help="run only what is not recorded yet")
    parser.add_argument("--read", action="store_true", help="draw and print what is recorded, run nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "learning_curves.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "learning_curves.png")
    arguments = parser.parse_args()
    base = arguments.folder or Path(tempfile.mkdtemp())
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for algo in [] if arguments.read else arguments.algos:
        for seed in arguments.seeds:
            if arguments.missing and str(seed) in results.get(algo, {}):
                continue
            found = run([f"algo={algo}", f"seed={seed}"], base / f"{algo}_{seed}")
            results.setdefault(algo, {})[str(seed)] = found
            results = ordered(results)
            arguments.results.write_text(json.dumps(results) + "\n")
            print(table({algo: {str(seed): found}}).splitlines()[-1], file=sys.stderr, flush=True)
    draw(results, arguments.figure)
    print(table(results))


if __name__ == "__main__":
    main()

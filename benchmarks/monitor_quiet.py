"""Whether the stability monitor is quiet where all is well: findings of sound runs on the built-in task, by seed.

    python benchmarks/monitor_quiet.py --algos grpo dapo --seeds 1 2 3 4 5 6 7 8 9 10
    python benchmarks/monitor_quiet.py --algos ppo rloo --seeds 1 2 3 --rollouts 150
    python benchmarks/monitor_quiet.py --folder RUNS --read

Each run is the command a user types, `python -m lit_rlhf.train algo=NAME seed=N`, in a process of its own, as long as
its preset says or `--rollouts`. The table has what each has found and what it reached; the exit code is 1 where a run
has found anything. With --read nothing is run: the metrics of the runs that lie in --folder are shown to the monitor as
it is now, so that a bound can be moved without running all of them again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from hydra.utils import get_class
from learning_curves import run

from lit_rlhf.callbacks.stability_monitor import Finding, StabilityMonitor
from lit_rlhf.monitoring.run_folder import RunFolder

ALGOS = ("grpo", "dapo", "ppo", "rloo", "reinforce_pp", "gspo", "importance_sampling", "conservative_ppo", "dpo")
REACHED = ("val/accuracy_sampled", "val/preference_accuracy")


def found_anew(folder: Path) -> list[Finding]:
    """What the monitor says of a run that is over, from its `metrics.csv`."""
    algo: dict[str, Any] = yaml.safe_load((folder / "config" / "config.yaml").read_text())["algo"]
    module = get_class(algo.pop("_target_"))(**algo)
    monitor, trainer = StabilityMonitor(), SimpleNamespace(is_global_zero=False, loggers=[])
    for row in RunFolder.read(folder).rows:
        monitor.on_metrics(trainer, module, row)  # type: ignore[arg-type]
    return monitor.findings


def line(folder: Path, findings: list[Finding]) -> str:
    """A row of the table."""
    read = RunFolder.read(folder)
    algo, seed = folder.name.rsplit("_", 1)
    rollouts = read.line("rollout/iteration")
    reached = next((curve for name in REACHED if (curve := read.line(name)) is not None), None)
    said = "; ".join(f"**{f.gate}** since {f.since} until {f.until or 'the end'}: {f.says}" for f in findings)
    accuracy = "-" if reached is None else f"{reached.y[0]:.3f} to {reached.y[-1]:.3f}"
    return f"| {algo} | {seed} | {0 if rollouts is None else rollouts.y[-1]:.0f} | {accuracy} | {said or 'nothing'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", default=list(ALGOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(1, 11)))
    parser.add_argument("--rollouts", type=int, default=None, help="(or passes); by default as the preset says")
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here")
    parser.add_argument("--read", action="store_true", help="judge the runs that lie in --folder, run nothing")
    arguments = parser.parse_args()
    base = arguments.folder or Path(tempfile.mkdtemp())
    folders = [base / f"{algo}_{seed}" for algo in arguments.algos for seed in arguments.seeds]
    print("| algorithm | seed | rollouts or passes | held-out accuracy | found |\n|---|---|---|---|---|")
    disturbed = 0
    for folder in folders:
        if arguments.read:
            if not (folder / "metrics.csv").exists():
                continue
            findings = found_anew(folder)
        else:
            algo, seed = folder.name.rsplit("_", 1)
            longer = [] if arguments.rollouts is None else [f"trainer.max_epochs={arguments.rollouts}"]
            run([f"algo={algo}", f"seed={seed}", "callbacks.progress=null", *longer], folder)
            findings = [Finding(**found) for found in json.loads((folder / "findings.json").read_text())]
        disturbed += bool(findings)
        print(line(folder, findings), flush=True)
    raise SystemExit(1 if disturbed else 0)


if __name__ == "__main__":
    main()

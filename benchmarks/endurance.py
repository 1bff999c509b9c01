"""Whether a long run stays as large as it began: memory and open files over 2,000 rollouts of the built-in model.

    python benchmarks/endurance.py [--rollouts 2000] [--algo grpo] [KEY=VALUE ...]

Runs the command a user types, loggers, checkpoints and validation included, with small rollouts (4 prompts x 4 samples)
and notes resident memory and open files every 100 rollouts. Printed are these and the slope of the memory by least
squares after the first hundred, in MB per 100 rollouts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

ROOT = Path(__file__).resolve().parents[1]
EVERY = 100
SMALL = (
    "algo.prompts_per_rollout=4",
    "algo.group_size=4",
    "rollout.max_new_tokens=8",
    "data.held_out=8",
    "algo.lr=2e-5",
)


class Watch(Callback):
    """Writes down what the process holds.

    Args:
        file: JSON lines go there.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """One line per 100 rollouts."""
        if (trainer.current_epoch + 1) % EVERY:
            return
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        files = len(list(Path("/proc/self/fd").iterdir()))
        with self.file.open("a") as file:
            file.write(json.dumps({"rollouts": trainer.current_epoch + 1, "resident": resident, "files": files}) + "\n")


def slope(points: list[dict[str, float]]) -> float:
    """MB per 100 rollouts, least squares."""
    x, y = [p["rollouts"] / 100 for p in points], [p["resident"] for p in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2000)
    parser.add_argument("--algo", default="grpo")
    parser.add_argument("more", nargs="*", help="further arguments of the command")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    notes = folder / "watch.jsonl"
    command = [sys.executable, "-m", "lit_rlhf.train", f"algo={arguments.algo}", *SMALL]
    command += [f"trainer.max_epochs={arguments.rollouts}", f"hydra.run.dir={folder}/run", "threads=1"]
    command += ["+callbacks.watch._target_=endurance.Watch", f"+callbacks.watch.file={notes}", *arguments.more]
    paths = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", str(ROOT))])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    points = [json.loads(line) for line in notes.read_text().splitlines()]
    print("| rollouts | resident MB | open files |\n|---|---|---|")
    for point in points:
        print(f"| {point['rollouts']:.0f} | {point['resident']:.1f} | {point['files']} |")
    print(f"\nafter the first hundred: {slope(points[1:]):+.3f} MB per 100 rollouts")


if __name__ == "__main__":
    main()

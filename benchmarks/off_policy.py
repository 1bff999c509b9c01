"""What importance correction is worth on stale data: the same run with and without it.

    python benchmarks/off_policy.py

Both arms train on completions that weights four rollouts old have sampled (`algo.min_staleness=4 algo.buffer_size=5`),
with the same settings, seeds and prompts; one weighs them by what the policy would say now, the other takes them as if
they were fresh. A rollout is four optimiser steps, so the gap is sixteen to nineteen steps. Prints the sampled accuracy
on held-out problems after the run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean

from learning_curves import run

STALE = ["algo=importance_sampling", "algo.min_staleness=4", "algo.buffer_size=5"]
SETTING = ["algo.minibatches=4", "trainer.max_epochs=80", "trainer.check_val_every_n_epoch=40"]
ARMS = {"corrected": "token", "uncorrected": "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here")
    parser.add_argument("setting", nargs="*", default=SETTING, help="of both arms, as on the command line of a run")
    arguments = parser.parse_args()
    base = arguments.folder or Path(tempfile.mkdtemp())
    print(" ".join([*STALE, *arguments.setting]), file=sys.stderr)
    print(f"| seed | {' | '.join(ARMS)} |\n|---|---|---|")
    after: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in arguments.seeds:
        for arm, level in ARMS.items():
            own = [f"algo.importance_correction={level}", f"seed={seed}"]
            found = run([*STALE, *arguments.setting, *own], base / f"{arm}_{seed}")
            after[arm].append(found["curve"]["accuracy_sampled"][-1])
        print(f"| {seed} | {' | '.join(f'{values[-1]:.3f}' for values in after.values())} |", flush=True)
    print(f"| mean | {' | '.join(f'{mean(values):.3f}' for values in after.values())} |")


if __name__ == "__main__":
    main()

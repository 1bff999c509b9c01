"""How near ConservativePPO stays to the reference: the same run with and without its penalty.

    python benchmarks/conservative.py

Prints the KL to the reference, exact over the vocabulary, in nats per token and as a mean over each rollout's optimiser
steps: the most of the run, the most of its second half and at the end; and the sampled accuracy on held-out problems.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from learning_curves import column, run

SETTING = ["algo.max_kl_divergence=0.025", "trainer.max_epochs=60", "trainer.check_val_every_n_epoch=30"]
ARMS = {"penalty": ["algo.conservative_coef=200"], "no penalty": ["algo.conservative_coef=0"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here")
    parser.add_argument("setting", nargs="*", default=SETTING, help="of both arms, as on the command line of a run")
    arguments = parser.parse_args()
    base = arguments.folder or Path(tempfile.mkdtemp())
    print("| seed | arm | threshold | most KL | in the second half | at the end | sampled accuracy, after |")
    print("|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        for arm, own in ARMS.items():
            folder = base / f"{arm.replace(' ', '_')}_{seed}"
            found = run(["algo=conservative_ppo", f"seed={seed}", *arguments.setting, *own], folder)
            kl, threshold = (column(folder, f"stability/{n}") for n in ("kl_divergence", "max_kl_threshold"))
            numbers = [threshold[-1], max(kl), max(kl[len(kl) // 2 :]), kl[-1], found["curve"]["accuracy_sampled"][-1]]
            print(f"| {seed} | {arm} | {' | '.join(f'{number:.3f}' for number in numbers)} |", flush=True)


if __name__ == "__main__":
    main()

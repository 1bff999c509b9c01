"""Whether the cost of a step grows as its rows do: W3 of vs_trl.py with 64, 128 and 256 rows.

    python benchmarks/linearity.py [--rounds 5] [--threads 2]

The sizes take turns, each in a process of its own. Lengths are random, so time is per sampled token; what is printed is
the median over the rounds of that time over the time with 64 rows, 1 where the cost is proportional.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import side_ours
from workers import Worker
from workloads import WORKLOADS

FACTORS = (1, 2, 4)


def measure(rounds: int, threads: int) -> dict[int, list[float]]:
    """Seconds per sampled token, by factor, of every round after a first one of warm-up."""
    work = WORKLOADS["W3"]
    workers = {n: Worker(side_ours.train, replace(work, rows=n * work.rows), threads) for n in FACTORS}
    found: dict[int, list[float]] = {n: [] for n in FACTORS}
    try:
        for _ in range(rounds + 1):
            for n, worker in workers.items():
                block = worker.run(max(FACTORS) // n)  # as many rows in each block
                found[n].append(block.seconds / block.sampled_tokens)
    finally:
        for worker in workers.values():
            worker.close()
    return {n: seconds[1:] for n, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.threads)
    print("| rows | ms per token | over that with 64 rows |")
    print("|---|---|---|")
    for n, seconds in found.items():
        relative = statistics.median(s / first for s, first in zip(seconds, found[1], strict=True))
        print(f"| {n * WORKLOADS['W3'].rows} | {1e3 * statistics.median(seconds):.2f} | {relative:.2f} |")


if __name__ == "__main__":
    main()

"""This library side by side with TRL: the same work, in turns, time and memory of whole steps.

    pip install 'lit_rlhf[bench]'
    python benchmarks/vs_trl.py [--only W1 W3] [--pairs 5] [--steps 2] [--threads 2] [--stories FOLDER] [--json FILE]

Every workload is trained by both libraries' own trainers (`lightning.Trainer` over our modules; `GRPOTrainer`,
`DPOTrainer`, `SFTTrainer`), each in a process of its own which is warm and waits while the other one computes. A pair
is a block of steps of the one and then of the other; the ratio is TRL's time over ours. Same weights, same prompts or
rows, same threads, float32, AdamW, gradient clipping at 1, the same number of rows per optimiser step, no KL and no
reference for GRPO; what TRL is given beside that stands in `side_trl.py`. Time and tokens are of whole steps, rollout
and update; where the lengths are random, time is per sampled token.

`cpu` is the ratio of the processor time of all threads, which other work on the machine changes less. Memory is the
resident memory's peak over what it was before the first step; the last column is its ratio without the gradients and
AdamW's moments, which both hold (12 bytes per parameter).

The benchmark fails if the work differs: if one side sampled or trained on another number of tokens (where lengths are
random: by more than chance allows), or if the losses or the gradients of the same rows disagree.
W1 has random weights of stories260k's sizes unless --stories names the model's folder. W7 is ours alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workers import Block, Worker
from workloads import WORKLOADS, Workload, build_model, with_stories

OPTIMIZER_BYTES = 12  # float32 of a gradient and two moments
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3  # relative; both compute in float32, in another order
DEVIATIONS = 4  # of the mean length of random completions, between the two sides
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}


def measure(work: Workload, pairs: int, steps: int, threads: int) -> dict[str, list[Block]]:
    """Blocks of both sides, in turns, after one of warm-up each."""
    import side_ours

    sides = {"ours": side_ours.train}
    if work.algorithm != "ppo":  # TRL has none any more
        import side_trl

        sides["trl"] = side_trl.train
    steps = steps if work.samples else work.steps_per_pass  # of a pass, so that both have trained on the same rows
    found: dict[str, list[Block]] = {side: [] for side in sides}
    workers = {side: Worker(train, work, threads) for side, train in sides.items()}
    try:
        for _ in range(pairs + 1):
            for side, worker in workers.items():
                found[side].append(worker.run(steps))
    finally:
        for worker in workers.values():
            worker.close()
    return {side: blocks[1:] for side, blocks in found.items()}


def check(work: Workload, found: dict[str, list[Block]]) -> dict[str, float]:
    """Raise `SystemExit` unless both sides did the same work."""
    from same_loss import compare

    ours, trl = found["ours"], found["trl"]
    tolerance = 0.0
    if work.ragged:
        rows = work.rows * sum(block.steps for block in ours)
        tolerance = DEVIATIONS * math.sqrt(2 / rows)  # a geometric length deviates by its mean
    for name in ("sampled_tokens", "trained_tokens"):
        mine, theirs = (sum(getattr(block, name) for block in blocks) for blocks in (ours, trl))
        if abs(mine - theirs) > tolerance * theirs:
            raise SystemExit(f"{work.name}: {name} differ, ours {mine}, TRL's {theirs}")
    loss, gradient = compare(work)
    if not (loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
        raise SystemExit(f"{work.name}: the loss differs by {loss:.1e}, the gradient by {gradient:.1e}, relatively")
    return {"loss_difference": loss, "gradient_difference": gradient}


def cost(work: Workload, block: Block, part: str) -> float:
    """Seconds of a step, or of a sampled token where lengths are random: of it all, of a part, or of the processors."""
    update = block.seconds - block.rollout_seconds
    of = {"step": block.seconds, "rollout": block.rollout_seconds, "update": update, "cpu": block.cpu_seconds}
    seconds = of[part]
    return seconds / (block.sampled_tokens if work.ragged else block.steps)


def ratios(work: Workload, found: dict[str, list[Block]], part: str) -> list[float]:
    """TRL's time over ours, of every pair."""
    pairs = zip(found["ours"], found["trl"], strict=True)
    return [cost(work, trl, part) / cost(work, mine, part) for mine, trl in pairs]


def row(work: Workload, found: dict[str, list[Block]]) -> dict[str, Any]:
    """What is reported of a workload: seconds of a step and its parts, megabytes, ratios."""
    told: dict[str, Any] = {"workload": work.name, "title": work.title}
    for side, blocks in found.items():
        told[side] = {
            "step": statistics.median(block.seconds / block.steps for block in blocks),
            "rollout": statistics.median(block.rollout_seconds / block.steps for block in blocks),
            "tokens": sum(block.trained_tokens for block in blocks) / sum(block.steps for block in blocks),
            "megabytes": blocks[-1].peak_bytes / 1e6,
            "blocks": [asdict(block) for block in blocks],
        }
        told[side]["update"] = told[side]["step"] - told[side]["rollout"]
    if "trl" in found:
        parts = ("step", "rollout", "update", "cpu") if work.samples else ("step", "cpu")
        told["ratios"] = {part: ratios(work, found, part) for part in parts}
        held = OPTIMIZER_BYTES * parameters(work) / 1e6
        mine, theirs = told["ours"]["megabytes"], told["trl"]["megabytes"]
        told["memory_ratios"] = {"all": mine / theirs, "beyond_optimizer": (mine - held) / (theirs - held)}
    return told


def parameters(work: Workload) -> int:
    """How many are trained."""
    return sum(p.numel() for p in build_model(work).parameters() if p.requires_grad)


HEADER = """\
|    | workload                                     | step: TRL / ours      | rollout | update | cpu  | \
ours: step (rollout + update) | TRL: step (rollout + update)  | memory: ours | TRL     | ours / TRL | beyond     |
|----|----------------------------------------------|-----------------------|---------|--------|------|-\
------------------------------|-------------------------------|--------------|---------|------------|------------|"""


def line(told: dict[str, Any]) -> str:
    """The row of the table."""
    cells = [f"{told['workload']:<2}", f"{told['title']:<44}"]
    given = told.get("ratios", {})
    spread = given.get("step")
    middle = f"{statistics.median(spread):.2f} ({min(spread):.2f} to {max(spread):.2f})" if spread else "-"
    cells.append(f"{middle:<21}")
    parts = [f"{statistics.median(given[part]):.2f}" if part in given else "-" for part in ("rollout", "update", "cpu")]
    cells += [f"{parts[0]:>7}", f"{parts[1]:>6}", f"{parts[2]:>4}"]
    for side in ("ours", "trl"):
        of = told.get(side)
        cells.append(f"{_seconds(of):<29}" if of else f"{'-':<29}")
    megabytes = [f"{told[side]['megabytes']:.0f} MB" if side in told else "-" for side in ("ours", "trl")]
    cells += [f"{megabytes[0]:>12}", f"{megabytes[1]:>7}"]
    of_memory = told.get("memory_ratios", {})
    cells += [f"{of_memory[which]:>10.2f}" if of_memory else f"{'-':>10}" for which in ("all", "beyond_optimizer")]
    return f"| {' | '.join(cells)} |"


def _seconds(of: dict[str, float]) -> str:
    parts = f" ({of['rollout']:.2f} + {of['update']:.2f})" if of["rollout"] else ""
    return f"{of['step']:.2f} s{parts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a block (DPO and SFT: a pass, 4)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stories", type=Path, default=None, help="stories260k's folder, for W1")
    parser.add_argument("--json", type=Path, default=None, help="write everything that was measured here")
    arguments = parser.parse_args()
    os.environ |= QUIET
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {arguments.threads} threads, CPU\n")
    print(HEADER)
    told = []
    for name in arguments.only:
        work = with_stories(WORKLOADS[name], arguments.stories)
        found = measure(work, arguments.pairs, arguments.steps, arguments.threads)
        told.append(row(work, found) | (check(work, found) if "trl" in found else {}))
        print(line(told[-1]), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

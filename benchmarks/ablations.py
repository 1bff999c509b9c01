"""What makes an update or a rollout cheaper, each on and off: the time, the memory, and that the numbers are the same.

    python benchmarks/ablations.py [--rounds 3] [--threads 2]

On and off take turns in a process of their own; the workloads are those of vs_trl.py, and the rows of an update the
same. Time and memory are ratios, off over on, of the medians; memory is the resident memory's peak over what it was
before. The benchmark fails if a loss or a gradient differs by more than 1e-5, relative, or a completion at all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import side_ours
import torch
from workers import forget_peak, memory
from workloads import WORKLOADS, Workload, build_model, sampled_rows

from lit_rlhf.models.forward import Shortcuts
from lit_rlhf.rollouts.engines import TransformersEngine, transformers
from lit_rlhf.types import SamplingConfig

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Ablation:
    """Something that can be switched off, where it is at home, and how."""

    title: str
    workload: str
    off: Callable[[Any], None]  # of the module; of the engine where it is about sampling
    samples: bool = False


def without(**shortcuts: bool) -> Callable[[Any], None]:
    """Score without these."""

    def switch(module: Any) -> None:
        module.models.shortcuts = replace(module.models.shortcuts, **shortcuts)

    return switch


def at_once(module: Any) -> None:
    """Take the micro-batch in one."""
    module.parts.tokens = None


def keep_ended_rows(engine: Any) -> None:
    """Decode rows that have ended until the last one has."""
    transformers._KEEP_FRACTION = 0.0


ABLATIONS = [
    Ablation("prompts read once per group", "W2", without(share_prompts=False)),
    Ablation("rows run by length", "W3", without(sort_by_length=False)),
    Ablation("vocabulary in tiles", "W4", without(chunk_vocabulary=False)),
    Ablation("`micro_batch_tokens=2048`", "W2", at_once),
    Ablation("all of these", "W3", lambda module: (at_once(module), setattr(module.models, "shortcuts", NONE))),
    Ablation("ended rows leave the batch", "W3", keep_ended_rows, samples=True),
]
NONE = Shortcuts(share_prompts=False, sort_by_length=False, chunk_vocabulary=False)


@dataclass(frozen=True)
class Run:
    """Seconds and peak bytes of every round, and what came out."""

    seconds: list[float]
    peak: int
    found: dict[str, torch.Tensor]


def updates(work: Workload, switch: Callable[[Any], None] | None, rounds: int) -> Run:
    """Forward and backward pass of an update."""
    module = side_ours.build_module(work, reward_funcs=[len], micro_batch_tokens=2048)
    if switch is not None:
        switch(module)
    rows = side_ours.experience(**sampled_rows(work, work.rows // work.group_size))
    forget_peak()
    seconds, before = [], memory("VmRSS")
    for _ in range(rounds + 1):
        module.zero_grad()
        started = time.perf_counter()
        module.begin_step(module.parts.of(module, rows))
        module.training_step(rows).backward()
        seconds.append(time.perf_counter() - started)
    peak = memory("VmHWM") - before
    found = {n: p.grad for n, p in module.models.policy.named_parameters() if p.grad is not None}
    loss = torch.tensor([module.pop_metrics()["loss"]])
    return Run(seconds[1:], peak, {"loss": loss, **found})


def rollouts(work: Workload, switch: Callable[[Any], None] | None, rounds: int) -> Run:
    """Sampling of a rollout."""
    engine = TransformersEngine([2], 0)
    engine.update_weights(build_model(work), 0)
    if switch is not None:
        switch(engine)
    prompts = torch.randint(3, work.vocabulary, (work.rows // work.group_size, work.prompt_length)).tolist()
    forget_peak()
    seconds, before = [], memory("VmRSS")
    for _ in range(rounds + 1):
        started = time.perf_counter()
        rollout = engine.generate(prompts, SamplingConfig(work.new_tokens, group_size=work.group_size), seed=1)
        seconds.append(time.perf_counter() - started)
    return Run(seconds[1:], memory("VmHWM") - before, {"completions": rollout.response_ids.float()})


def measure(index: int, on: bool, rounds: int, threads: int) -> Run:
    """One side of one ablation, in the process that calls this."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ablation = ABLATIONS[index]
    run = rollouts if ablation.samples else updates
    return run(WORKLOADS[ablation.workload], None if on else ablation.off, rounds)


def difference(on: Run, off: Run) -> float:
    """The greatest relative difference of anything that came out."""
    return max(float((on.found[n] - x).norm() / x.norm().clamp(min=1e-12)) for n, x in off.found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print("| | workload | time, off / on | memory, off / on | difference |")
    print("|---|---|---|---|---|")
    for index, ablation in enumerate(ABLATIONS):
        sides = []
        for on in (True, False):
            with get_context("spawn").Pool(1) as pool:
                sides.append(pool.apply(measure, (index, on, arguments.rounds, arguments.threads)))
        on, off = sides
        ratio = statistics.median(off.seconds) / statistics.median(on.seconds)
        error = difference(on, off)
        print(
            f"| {ablation.title} | {ablation.workload} | {ratio:.2f} | {off.peak / on.peak:.2f} | {error:.0e} |",
            flush=True,
        )
        if error > (0 if ablation.samples else TOLERANCE):
            raise SystemExit(f"{ablation.title}: on and off differ")


if __name__ == "__main__":
    main()

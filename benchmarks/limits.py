"""How near rollout and update come to the limit of the machine.

    python benchmarks/limits.py [--only W1 W2 W3 W4] [--steps 4] [--threads 2] [--stories FOLDER]

The limit is measured in the same run: the most float32 operations per second that a matrix product reaches, over
several sizes, and the most bytes per second that `c = a + s b` moves over arrays far larger than any cache. The model's
operations are counted by formula (2 per multiplication and addition): those that cannot be avoided, a prompt once
however many completions it has, real tokens only, forward once for the rollout, and forward and backward (three times
as many) for the update. Decoding has to read the weights once per step and the cache of the living rows. A part's bound
is the longer of the times that its operations and its bytes take at the machine's limits; the share is that bound over
the time taken.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import side_ours
import torch
from lightning.pytorch import Callback, Trainer
from workloads import WORKLOADS, Workload, build_rows, reward_of, with_stories

from lit_rlhf.data import RowsDataModule

FLOAT = 4  # bytes
SQUARES = (512, 1024, 2048, 4096)
STREAM = 64 * 2**20  # numbers in each array, 256 MB


def seconds_of(function: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of some calls: what else the machine does only ever adds."""
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


def product_rate(rows: int, inner: int, columns: int) -> float:
    """Operations per second of a matrix product."""
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    return 2 * rows * inner * columns / seconds_of(lambda: torch.mm(a, b, out=out))


def bandwidth() -> float:
    """Bytes per second: two arrays are read and one is written."""
    a, b, c = (torch.ones(STREAM) for _ in range(3))
    return 3 * FLOAT * STREAM / seconds_of(lambda: torch.add(a, b, alpha=0.5, out=c))


@dataclass(frozen=True)
class Work:
    """Operations and bytes."""

    operations: float
    bytes: float = 0.0

    def bound(self, peak: float, bandwidth: float) -> float:
        """Seconds that the machine needs at least."""
        return max(self.operations / peak, self.bytes / bandwidth)


@dataclass(frozen=True)
class Sizes:
    """What a Llama's operations depend on."""

    layer_weights: int  # of all layers' matrices
    head: int  # of the language-modelling head
    layers: int
    heads_width: int  # all query heads together
    cache_width: int  # keys and values of a token in a layer

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """From a model's configuration."""
        H, L = config.hidden_size, config.num_hidden_layers
        width = config.num_key_value_heads * config.head_dim
        queries = config.num_attention_heads * config.head_dim
        per_layer = 2 * H * queries + 2 * H * width + 3 * H * config.intermediate_size
        return cls(L * per_layer, H * config.vocab_size, L, queries, 2 * width)

    def forward(self, start: int, count: int, scored: int) -> float:
        """Operations of `count` tokens of a row behind `start` others, `scored` of which go through the head."""
        contexts = count * start + count * (count + 1) / 2  # every token attends to those before it and to itself
        return 2 * (count * self.layer_weights + scored * self.head) + 4 * self.layers * self.heads_width * contexts


def rollout_work(sizes: Sizes, work: Workload, lengths: Sequence[int]) -> Work:
    """Of completions of these lengths: each prompt's prefill, and a decoding step for every token but the last."""
    P, prompts = work.prompt_length, len(lengths) // work.group_size
    operations = prompts * sizes.forward(0, P, 1) + sum(sizes.forward(P, n - 1, n - 1) for n in lengths)
    weights = (sizes.layer_weights + sizes.head) * max(lengths)  # once in every step
    cache = sum((n - 1) * P + n * (n - 1) / 2 for n in lengths) * sizes.layers * sizes.cache_width
    return Work(operations, FLOAT * (weights + cache))


def update_work(sizes: Sizes, work: Workload, lengths: Sequence[int]) -> Work:
    """Forward and backward of the prompts, once each, and the completions."""
    P, prompts = work.prompt_length, len(lengths) // work.group_size
    return Work(3 * (prompts * sizes.forward(0, P, 1) + sum(sizes.forward(P, n - 1, n) for n in lengths)))


@dataclass
class Timed(Callback):
    """Times and completions of every step."""

    rollouts: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """A reward function, which sees every completion."""
        self.lengths.append([len(ids) for ids in completion_ids])
        return [reward_of(ids) for ids in completion_ids]

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """A step has ended."""
        self.rollouts.append(module.clock["rollout"])
        self.updates.append(module.clock["update"])


def measure(work: Workload, steps: int, peak: float, stream: float) -> list[str]:
    """Rows of the table: rollout and update."""
    timed = Timed()
    module = side_ours.build_module(work, reward_funcs=[timed.reward])
    side_ours.build_trainer(timed, max_epochs=steps + 1).fit(module, datamodule=RowsDataModule(build_rows(work)))
    sizes = Sizes.of(module.models.policy.config)
    lines = []
    for part, of, seconds in (("rollout", rollout_work, timed.rollouts), ("update", update_work, timed.updates)):
        steps_of = [(of(sizes, work, n), s) for n, s in zip(timed.lengths[1:], seconds[1:], strict=True)]
        rate = statistics.median(w.operations / s for w, s in steps_of)
        shares = [w.bound(peak, stream) / s for w, s in steps_of]
        found, taken = steps_of[0][0], statistics.median(seconds[1:])
        cells = [work.name, part, f"{found.operations / 1e9:.1f}", f"{found.bytes / 1e9:.2f}", f"{taken:.2f}"]
        cells += [f"{rate / 1e9:.1f}", f"{rate / peak:.0%}", f"{found.bound(peak, stream):.2f}"]
        lines.append(f"| {' | '.join([*cells, f'{statistics.median(shares):.0%}'])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, work in WORKLOADS.items() if work.algorithm == "grpo"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stories", type=Path, default=None, help="stories260k's folder, for W1")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rates = {f"{n} x {n} x {n}": product_rate(n, n, n) for n in SQUARES}
    peak, stream = max(rates.values()), bandwidth()
    print(f"{arguments.threads} threads, CPU, float32; memory {stream / 1e9:.1f} GB/s; products, GFLOP/s:")
    for H, rows in ((64, 64), (64, 4096), (256, 64), (256, 4096)):  # of the models: a decoding step's, an update's
        rates[f"{rows} x {H} x {4 * H}"] = product_rate(rows, H, 4 * H)
    print(", ".join(f"{name}: {rate / 1e9:.0f}" for name, rate in rates.items()) + "\n")
    print("|    | part | GFLOP | GB | seconds | GFLOP/s | of the peak | bound, seconds | bound / seconds |")
    print(f"|----|{'---|' * 8}")
    for name in arguments.only:
        for line in measure(with_stories(WORKLOADS[name], arguments.stories), arguments.steps, peak, stream):
            print(line, flush=True)


if __name__ == "__main__":
    main()

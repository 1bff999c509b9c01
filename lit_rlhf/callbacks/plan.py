"""What a run is about to do, in a few lines, before its first step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn

from lit_rlhf.models.parallel import local


class DryRunError(Exception):
    """The plan is printed and nothing else was asked for."""


class Plan(Callback):
    """Print the plan when everything stands and is checked: models, loaders, devices.

    Args:
        dry_run: then stop, before anything is sampled or trained.
    """

    def __init__(self, dry_run: bool = False) -> None:
        self.dry_run = dry_run

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Print, on the first rank.

        Raises:
            DryRunError: it is one.
        """
        if trainer.is_global_zero:
            print("\n".join(plan(trainer, pl_module)), file=sys.stderr)
        if self.dry_run:
            raise DryRunError


def plan(trainer: Trainer, module: Any) -> Iterator[str]:
    """Lines that say what is trained, how many steps of what size, and the memory that is needed at least."""
    devices, steps = trainer.world_size, -(-int(trainer.num_training_batches) // module.accumulate)
    yield _what(trainer, module)
    accumulated = f" in {module.accumulate} micro-batches" if module.accumulate > 1 else ""
    if hasattr(module, "prompts_per_rollout"):
        prompts, G = module.prompts_per_rollout, module.group_size
        rows, name, longest = prompts * G // module.minibatches, "rollouts", module.sampling.max_new_tokens
        yield f"  a rollout: {prompts} prompts x {G} = {prompts * G} completions of at most {longest} tokens"
        passes = f"{module.update_epochs} x {module.minibatches}"
        yield f"  its update: {passes} = {steps} optimiser steps on {rows} completions each"
    else:
        rows, name = module.batch_size, "passes"
        yield f"  a pass: {steps} optimiser steps on {rows} rows each"
    yield f"  a step: {rows // devices} rows per device{accumulated}, learning rate {module.lr:.3g} at most"
    if module.total_steps is not None:
        yield f"  the run: {module.total_steps / steps:.0f} {name}, {module.total_steps:,} optimiser steps"
    yield f"  memory per device at least: {_memory(module)}, and activations"


def _what(trainer: Trainer, module: Any) -> str:
    """The algorithm, the model, and where they run."""
    policy, devices = module.models.policy, trainer.world_size
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    size, name = _count(sum(p.numel() for p in policy.parameters())), type(policy).__name__
    place = f"{devices} x {module.device.type}" + (f" by {type(trainer.strategy).__name__}" if devices > 1 else "")
    return (
        f"{type(module).__name__}: {name} of {size} parameters, {_count(trained)} trained; {place}, {trainer.precision}"
    )


def _memory(module: Any) -> str:
    """Of what is held throughout; a sharded model's shards are as many times smaller."""
    held = sum(_bytes(p) for p in module.models.parameters())
    trained = sum(_bytes(p) for p in module.parameters() if p.requires_grad)
    parts = {"weights": held, "gradients": trained, "AdamW": 2 * trained}
    return ", ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in parts.items())


def _bytes(parameter: nn.Parameter) -> int:
    shard = local(parameter)
    return shard.numel() * shard.element_size()


def _count(number: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"

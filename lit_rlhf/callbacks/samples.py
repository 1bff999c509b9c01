"""Completions as they were sampled, with what they earned: `samples.jsonl`, and tables and histograms in W&B."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lit_rlhf.callbacks.hooks import RLHFCallback
from lit_rlhf.errors import check_number
from lit_rlhf.rollouts.sampler import decode, sampled_ids
from lit_rlhf.types import Experience

_COLUMNS = ("prompt", "completion", "reward", "advantage", "tokens", "finish")


class Samples(RLHFCallback):
    """Write down some completions of the first rank every so many rollouts, of the first and of the last one.

    Args:
        file: JSON lines, one per completion, go there; a run that is resumed goes on with it.
        every_n_rollouts: how often.
        groups: prompts to write down each time, with all of their completions.
    """

    def __init__(self, file: str | Path, every_n_rollouts: int = 10, groups: int = 2) -> None:
        check_number("callbacks.samples.every_n_rollouts", every_n_rollouts, at_least=1)
        check_number("callbacks.samples.groups", groups, at_least=1)
        self.file, self.every, self.groups = Path(file), every_n_rollouts, groups

    def on_rollout(self, trainer: Trainer, module: Any, experience: Experience) -> None:
        """Write down, if it is time."""
        iteration = module.loop.iteration
        last = trainer.max_epochs is not None and iteration == trainer.max_epochs - 1
        if not trainer.is_global_zero or (iteration % self.every and not last):
            return
        lines = list(self._lines(module, experience[: self.groups * module.group_size]))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                names = module.rewards.names
                rows = [[*(line[column] for column in _COLUMNS), *line["rewards"].values()] for line in lines]
                logger.log_table("samples", [*_COLUMNS, *names], rows, step=trainer.global_step)
                found = {"rollout/iteration": float(iteration), **_histograms(experience)}
                logger.log_metrics(found, step=trainer.global_step)

    def _lines(self, module: Any, rows: Experience) -> Iterator[dict[str, Any]]:
        prompts = module.tokenizer.batch_decode(
            [ids[mask].tolist() for ids, mask in zip(rows.prompt_ids, rows.prompt_mask, strict=True)],
            skip_special_tokens=True,
        )
        completions, ids = decode(module.tokenizer, rows), sampled_ids(rows)
        for i, completion in enumerate(completions):
            advantages = rows.advantages[i][rows.response_mask[i]]
            yield {
                "rollout": module.loop.iteration,
                "group": int(rows.group_ids[i]),
                "prompt": prompts[i],
                "completion": completion,
                "reward": _plain(rows.raw_rewards[i]),
                "rewards": dict(zip(module.rewards.names, map(_plain, rows.reward_parts[i]), strict=True)),
                "advantage": _plain(advantages.mean()) if len(advantages) else None,
                "tokens": len(ids[i]),
                "finish": "length" if rows.truncated[i] else "stop",
            }


def _plain(x: Tensor) -> float | None:
    """A number for JSON; None where there is none."""
    return round(float(x), 6) if bool(x.isfinite()) else None


def _histograms(rows: Experience) -> dict[str, Any]:
    import wandb

    found = {
        "reward/histogram": rows.raw_rewards,
        "stability/advantage_histogram": rows.advantages[rows.response_mask],
        "rollout/length_histogram": rows.response_mask.sum(1).float(),
    }
    finite = {name: x[x.isfinite()].detach().cpu() for name, x in found.items()}
    return {name: wandb.Histogram(x.tolist()) for name, x in finite.items() if len(x)}

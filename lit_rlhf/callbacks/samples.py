"""Completions as they were sampled, with what they earned: `samples.jsonl`, and tables and histograms in W&B."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lit_rlhf.callbacks.hooks import RLHFCallback
from lit_rlhf.errors import check_number
from lit_rlhf.rollouts.sampler import decode, sampled_ids
from lit_rlhf.types import Experience

_SHOWN = {"rollout", "prompt", "completion", "reward", "rewards", "advantage", "tokens", "finish"}  # of a row
_TABLE_ROWS, _TABLE_CHARACTERS = 1000, 1_000_000  # of the newest samples: W&B is sent all of them each time


class Samples(RLHFCallback):
    """Write down some completions of the first rank every so many rollouts, of the first and of the last one.

    With a W&B logger they are a table, `samples`, too, which grows from rollout to rollout, a resumed run's as well;
    and there are histograms of these rollouts: of rewards, advantages and lengths of the first rank, and of the ratio
    of policy and old policy over all tokens that were trained on.

    Args:
        file: JSON lines, one per completion, go there; a run that is resumed goes on with it.
        every_n_rollouts: how often.
        groups: prompts to write down each time, with all of their completions.
    """

    def __init__(self, file: str | Path, every_n_rollouts: int = 10, groups: int = 2) -> None:
        check_number("callbacks.samples.every_n_rollouts", every_n_rollouts, at_least=1)
        check_number("callbacks.samples.groups", groups, at_least=1)
        self.file, self.every, self.groups = Path(file), every_n_rollouts, groups
        self._table: deque[dict[str, Any]] = deque(maxlen=_TABLE_ROWS)

    def on_rollout(self, trainer: Trainer, module: Any, experience: Experience) -> None:
        """Write down, if it is time."""
        if not trainer.is_global_zero or not self._is_time(trainer, module.loop.iteration):
            return
        lines = list(self._lines(module, experience[: self.groups * module.group_size]))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._add(lines)
                found = {"samples": _table(self._table), **_histograms(experience)}
                found["rollout/iteration"] = float(module.loop.iteration)
                logger.log_metrics(found, step=trainer.global_step)

    def on_metrics(self, trainer: Trainer, module: LightningModule, values: Mapping[str, float]) -> None:
        """Log how the ratios were spread; every rank has to be asked for its own."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        ratios = getattr(module, "ratios", None)
        iteration = int(values.get("rollout/iteration", 0))  # 1 when the first is over
        if not loggers or ratios is None or not iteration or not self._is_time(trainer, iteration - 1):
            return
        counts, edges = ratios.compute()
        for logger in loggers:
            found = {"rollout/iteration": float(iteration), "stability/ratio_histogram": _histogram(counts, edges)}
            logger.log_metrics(found, step=trainer.global_step)

    def _is_time(self, trainer: Trainer, iteration: int) -> bool:
        last = trainer.max_epochs is not None and iteration == trainer.max_epochs - 1
        return last or not iteration % self.every

    def _add(self, lines: list[dict[str, Any]]) -> None:
        """Keep them for the table, and of the earlier ones as many as there is room for."""
        self._table.extend(lines)
        while sum(len(line["prompt"]) + len(line["completion"]) for line in self._table) > _TABLE_CHARACTERS:
            if self._table[0]["rollout"] == self._table[-1]["rollout"]:
                break
            self._table.popleft()

    def state_dict(self) -> dict[str, Any]:
        """The table's rows: that of a resumed run goes on."""
        return {"table": list(self._table)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse, without rows that lack what the table shows: another version's must not end the run."""
        rows = state_dict.get("table", ())
        self._table = deque((row for row in rows if row.keys() >= _SHOWN), maxlen=_TABLE_ROWS)

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


def _table(lines: Iterable[dict[str, Any]]) -> Any:
    """A W&B table, a completion a row."""
    import wandb

    names = list(dict.fromkeys(name for line in lines for name in line["rewards"]))
    columns = ["rollout", "prompt", "completion", "reward", *(f"rewards/{name}" for name in names)]
    rows = [
        [
            *(line[name] for name in ("rollout", "prompt", "completion", "reward")),
            *(line["rewards"].get(name) for name in names),
            *(line[name] for name in ("advantage", "tokens", "finish")),
        ]
        for line in lines
    ]
    return wandb.Table(columns=[*columns, "advantage", "length", "finish_reason"], data=rows)


def _histograms(rows: Experience) -> dict[str, Any]:
    """Of what was sampled; the bins follow the values."""
    found = {
        "reward/histogram": rows.raw_rewards,
        "stability/advantage_histogram": rows.advantages[rows.response_mask],
        "rollout/length_histogram": rows.response_mask.sum(1),
    }
    finite = {name: x[x.isfinite()].detach().float().cpu().numpy() for name, x in found.items()}
    return {name: _histogram(*np.histogram(x, bins=64)) for name, x in finite.items() if len(x)}


def _histogram(counts: Any, edges: Any) -> Any:
    import wandb

    return wandb.Histogram(np_histogram=(np.asarray(counts.tolist()), np.asarray(edges.tolist())))

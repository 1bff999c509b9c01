"""Optimiser steps whose gradient is not finite: left out on all ranks together, written down, and too many end the run.

A single NaN or infinity in a gradient would be in every weight after the step, and in everything sampled from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.durable import reason_of, remove, write_durably
from lit_rlhf.errors import InputError, check_number
from lit_rlhf.models.parallel import local

if TYPE_CHECKING:
    from lit_rlhf.algorithms.base import RLHFModule

_IN_A_ROW = "skipped_steps"  # of `LoopState.numbers`, so that a resumed run goes on counting
_MOST_DUMPS = 10  # of a process
_WHAT_TO_DO = (
    "lower algo.lr, look for rewards or given log-probs that are huge, or compute in bf16 or float32, not float16"
)


class NonFiniteSteps:
    """Decides over optimiser steps by the norm of their gradient, which is the same number on every rank.

    Args:
        limit: steps in a row that may be skipped before the run ends.
    """

    def __init__(self, limit: int) -> None:
        check_number("algo.max_skipped_steps", limit, at_least=1)
        self.limit = limit
        self.rows: Sequence[Any] = ()  # the step's micro-batches on this rank
        self._dumps = 0

    def skips(self, module: RLHFModule, norm: Tensor) -> bool:
        """Whether to leave the step out; if so, its rows are dumped.

        Raises:
            InputError: it is the last of `limit` in a row.
        """
        numbers = module.loop.numbers
        if bool(norm.isfinite()):
            numbers.pop(_IN_A_ROW, None)
            return False
        in_a_row = numbers[_IN_A_ROW] = numbers.get(_IN_A_ROW, 0.0) + 1
        folder = Path(module.trainer.default_root_dir) / "nonfinite"
        found = self._dump(module, folder)
        step = module.trainer.global_step
        if in_a_row >= self.limit:
            raise InputError(
                f"the gradients of {self.limit} optimiser steps in a row were not finite, the last step {step}; "
                f"no weight was changed by them; {found}; {_WHAT_TO_DO}, and resume from the last checkpoint"
            )
        if module.rank == 0:
            warnings.warn(f"optimiser step {step} is left out: its gradient is {float(norm)}; {found}", stacklevel=2)
        return True

    def _dump(self, module: RLHFModule, folder: Path) -> str:
        """Write this rank's rows of the step, tensors and plain containers; returns what they are like and where."""
        step, iteration = module.trainer.global_step, module.loop.iteration
        suspicious = {name for rows in self.rows for name, bad in _suspicious(rows).items() if bool(bad.any())}
        gradients = {n: local(p.grad) for n, p in module.models.named_parameters() if p.grad is not None}
        weights = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        said = f"not finite in them: {', '.join(sorted(suspicious))}" if suspicious else "their numbers are finite"
        if self._dumps == _MOST_DUMPS:
            return f"its rows are not written down, as those of {_MOST_DUMPS} steps are ({said})"
        content = {"step": step, "iteration": iteration, "parameters": weights, "rows": [_plain(r) for r in self.rows]}
        file = folder / f"step_{step}_rank_{module.rank}.pt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(content, file)
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of its writer's; the other ranks go on
            remove(file)
            return f"its rows could not be written to {folder} ({reason_of(error)}; {said})"
        self._dumps += 1
        return f"its rows lie in {folder} ({said})"


def _suspicious(rows: Any) -> dict[str, Tensor]:
    """Rows `[N]` with a number that is not finite where it counts, by field."""
    found, mask = {}, rows.response_mask
    for name, x in _tensors(rows).items():
        if not x.is_floating_point() or x.ndim == 0 or name == "reward_parts":
            continue
        bad = ~x.isfinite()
        if name == "old_logprobs" and getattr(rows, "unscored", None) is not None:
            bad &= ~rows.unscored.unsqueeze(1)  # which are left to the update, and are no numbers until then
        found[name] = (bad & mask).any(1) if x.shape == mask.shape else bad
    return found


def _plain(rows: Any) -> dict[str, Tensor]:
    bad = _suspicious(rows)
    marked = torch.stack(list(bad.values())).any(0) if bad else torch.zeros(len(rows), dtype=torch.bool)
    return {**{name: x.detach().cpu() for name, x in _tensors(rows).items()}, "nonfinite": marked.cpu()}


def _tensors(rows: Any) -> dict[str, Tensor]:
    named = ((f.name, getattr(rows, f.name)) for f in fields(rows))
    return {name: x for name, x in named if isinstance(x, Tensor)}

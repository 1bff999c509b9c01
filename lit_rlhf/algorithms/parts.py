"""A micro-batch in parts of so many tokens: what a step has to remember is bounded, and its gradient is the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from lit_rlhf.errors import InputError, check_number
from lit_rlhf.models.forward import token_parts
from lit_rlhf.models.parallel import is_sharded
from lit_rlhf.ranks import most_over_ranks
from lit_rlhf.rollouts.loader import step_counts

if TYPE_CHECKING:
    from lit_rlhf.algorithms.base import RLHFModule


class Parts:
    """The parts of the micro-batch at hand.

    Args:
        tokens: most tokens of a part; None leaves micro-batches whole.
    """

    def __init__(self, tokens: int | None) -> None:
        check_number("algo.micro_batch_tokens", 1 if tokens is None else tokens, at_least=1)
        self.tokens = tokens
        self.count = 1  # of the micro-batch at hand
        self._left = 0
        self._terms: dict[str, Tensor | float] = {}

    def of(self, module: RLHFModule, batch: Any) -> list[Any]:
        """The micro-batch in parts, each with the optimiser step's counts; or as it is.

        Raises:
            InputError: with DeepSpeed.
        """
        if self.tokens is None:
            return [batch]
        if isinstance(getattr(module._trainer, "strategy", None), DeepSpeedStrategy):
            raise InputError(
                "algo.micro_batch_tokens: DeepSpeed counts the backward passes of a step; leave it out and raise "
                "trainer.accumulate_grad_batches"
            )
        if batch.step_tokens is None or batch.step_rows is None:
            tokens, rows = (n * module.accumulate for n in step_counts([batch.response_mask], module.device))
            batch = replace(batch, step_tokens=tokens, step_rows=rows)
        parts = [batch[part] for part in token_parts(batch, self.tokens, module.models.shares_prompts)]
        if is_sharded(module.models):  # its backward pass is a collective
            parts += [batch[:0]] * (most_over_ranks(len(parts), module.device) - len(parts))
        return parts

    def loss(self, module: RLHFModule, batch: Any, loss_of: Callable[[Any], Tensor]) -> Tensor:
        """The loss of the last part; those before it have been through the backward pass by then."""
        *first, last = self.of(module, batch)
        trainer = module._trainer
        if self.tokens is not None and trainer is not None and trainer.fit_loop.batch_idx % module.accumulate == 0:
            cast(torch.optim.Optimizer, module.optimizers()).zero_grad()  # Lightning's own time for it is too late
        self.count, self._left, self._terms = 1 + len(first), len(first), {}
        try:
            for part in first:
                if trainer is None:
                    loss_of(part).backward()  # type: ignore[no-untyped-call]
                else:
                    trainer.strategy.backward(loss_of(part) / module.accumulate, None)
                self._left -= 1
            return loss_of(last)
        finally:
            self.count, self._left = 1, 0

    def sum_terms(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
        """Add a part's terms of the loss up; returns those of the micro-batch once it is complete, before that none."""
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term
        if self._left:
            return {}
        found, self._terms = self._terms, {}
        return found

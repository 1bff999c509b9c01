"""What Lightning iterates over: sized, lazy views of the module's own loop state.

One fit epoch is one rollout (or one pass over the data). The views have a length, so Lightning prefetches
nothing and every rollout is sampled by the weights of its own epoch; they hold no state, so a checkpoint of
the module is all that is needed to continue in the middle of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lit_rlhf.ranks import sum_over_ranks
from lit_rlhf.rollouts.random import permutation
from lit_rlhf.text import Text
from lit_rlhf.types import CompletionBatch, Experience, PreferenceBatch, PromptBatch, Row

if TYPE_CHECKING:
    from lit_rlhf.algorithms.base import RLHFModule
    from lit_rlhf.algorithms.on_policy import OnPolicyModule

Batch = TypeVar("Batch", Experience, CompletionBatch, PreferenceBatch)


class PromptStream:
    """The dataset repeated for ever, each pass in an order of its own; any stretch of it can be recomputed.

    Args:
        rows: the dataset; every row has a `"prompt"`, a text or chat messages.
        encode: turns a prompt into token ids.
        seed: decides the order of every pass.
    """

    def __init__(self, rows: Sequence[Row], encode: Callable[[Text], list[int]], seed: int) -> None:
        self.rows, self.encode, self.seed = rows, encode, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def take(self, start: int, count: int) -> PromptBatch:
        """The prompts at stream positions `start` to `start + count - 1`."""
        index = list(range(start, start + count))
        return self.at(index, [self._row(i) for i in index])

    def at(self, index: list[int], rows: Sequence[int]) -> PromptBatch:
        """The prompts of these rows of the dataset, drawn for these stream positions."""
        return replace(prompt_batch([self.rows[i] for i in rows], self.encode, index), rows=rows)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.rows), self.seed, epoch).tolist())
        return self._order[1][offset]


class RolloutLoader:
    """One epoch: collect a rollout, then its micro-batches, `update_epochs * minibatches * accumulate` of them."""

    def __init__(self, module: OnPolicyModule) -> None:
        self.module = module

    def __len__(self) -> int:
        module = self.module
        return module.update_epochs * module.minibatches * module.accumulate

    def plan(self) -> list[Tensor]:
        """The rows of every micro-batch of this rollout; each pass over it has an order of its own."""
        module = self.module
        rows, parts = module.prompts_per_rank * module.group_size, module.minibatches * module.accumulate
        passes = [permutation(rows, module.seed, module.loop.iteration, e) for e in range(module.update_epochs)]
        return [chunk for order in passes for chunk in order.chunk(parts)]

    def __iter__(self) -> Iterator[Experience]:
        module, state = self.module, self.module.loop
        if state.experience is None:
            state.experience = module.collect(module.next_prompts())
            module.tell_callbacks("on_rollout", state.experience)
        experience = state.experience
        for batch in _micro_batches(module, self.plan(), lambda rows: experience[rows].trim()):
            yield batch.with_signal() if module.skip_zero_advantage else batch

    def state_dict(self) -> dict[str, Any]:
        """Empty: the state is the module's. Its presence tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore, see `state_dict`."""


class PassLoader:
    """One epoch: one pass over a dataset in micro-batches; a last incomplete batch is left to later passes.

    Args:
        module: whose loop state says which pass this is and how much of it is done.
        rows_of: the dataset of pass i; it may differ from pass to pass.
        collate: turns rows into a batch.
        batch_size: rows of one optimiser step, over its micro-batches and ranks.
    """

    def __init__(
        self,
        module: RLHFModule,
        rows_of: Callable[[int], Sequence[Row]],
        collate: Callable[[list[Row]], CompletionBatch],
        batch_size: int,
    ) -> None:
        self.module, self.rows_of, self.collate, self.batch_size = module, rows_of, collate, batch_size
        self.steps = len(rows_of(0)) // batch_size

    def __len__(self) -> int:
        return self.steps * self.module.accumulate

    def __iter__(self) -> Iterator[CompletionBatch]:
        module, iteration = self.module, self.module.loop.iteration
        rows = self.rows_of(iteration)
        order = permutation(len(rows), module.seed, iteration)[: self.steps * self.batch_size]
        mine = order.view(self.steps, module.world_size, -1)[:, module.rank]
        plan = list(mine.reshape(len(self), -1))
        yield from _micro_batches(module, plan, lambda index: self.collate([rows[i] for i in index.tolist()]))

    state_dict = RolloutLoader.state_dict
    load_state_dict = RolloutLoader.load_state_dict


class PromptLoader:
    """Held-out prompts in batches, this rank's share of them.

    Every rank has as many batches as the first: Lightning would leave a rank without any out of the validation that the
    others wait for it in. What fills up is the first row, as a `filler`.
    """

    def __init__(
        self, rows: Sequence[Row], encode: Callable[[Text], list[int]], batch_size: int, rank: int, world_size: int
    ) -> None:
        self.rows, self.encode = rows, encode
        self.plan = shares(len(rows), batch_size, rank, world_size)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[PromptBatch]:
        for index in self.plan:
            batch = prompt_batch([self.rows[i] for i in index or [0]], self.encode, index or [0])
            yield replace(batch, filler=not index)


def shares(rows: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """The row numbers of this rank's batches; every rank has as many batches, and a last one may be empty.

    >>> shares(5, 2, rank=0, world_size=2), shares(5, 2, rank=1, world_size=2)
    ([[0, 2], [4]], [[1, 3], []])
    """
    mine, most = range(rank, rows, world_size), -(-rows // world_size)
    return [list(mine[start : start + batch_size]) for start in range(0, most, batch_size)]


def prompt_batch(rows: Sequence[Row], encode: Callable[[Text], list[int]], index: list[int]) -> PromptBatch:
    """Encode the prompts of `rows` and gather their columns."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return PromptBatch([encode(text) for text in columns["prompt"]], columns, index)


def _micro_batches(module: RLHFModule, plan: Sequence[Tensor], batch_of: Callable[[Tensor], Batch]) -> Iterator[Batch]:
    """Yield the plan's micro-batches from where the loop state stands, each with its optimiser step's counts."""
    state, accumulate = module.loop, module.accumulate
    step: list[Batch] = []
    for position in range(state.position, len(plan)):
        within = position % accumulate
        if not step:
            first = position - within
            step = [batch_of(index) for index in plan[first : first + accumulate]]
            tokens, rows = step_counts([batch.response_mask for batch in step], module.device)
            step = [replace(batch, step_tokens=tokens, step_rows=rows) for batch in step]
            module.start_step([part for batch in step for part in module.parts.of(module, batch)])
        state.position = position + 1
        if state.position == len(plan):
            state.finish_iteration()
        yield step[within]
        if within == accumulate - 1:
            step = []


def step_counts(masks: Sequence[Tensor], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Masked tokens and non-empty rows over the masks `[n, T]` given and all ranks, as scalar tensors."""
    counts = torch.stack([torch.stack([mask.sum(), mask.any(1).sum()]) for mask in masks]).sum(0).to(device)
    tokens, rows = sum_over_ranks(counts)
    return tokens, rows

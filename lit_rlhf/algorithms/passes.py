"""What the algorithms share that make passes over a dataset: batches of its rows, and of the held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lit_rlhf.algorithms.base import RLHFModule
from lit_rlhf.data.columns import check_completions
from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.loader import PassLoader, shares
from lit_rlhf.types import CompletionBatch, PreferenceBatch, Row

Collate = Callable[[list[Row]], Any]


def pass_loader(
    module: RLHFModule,
    rows_of: Callable[[int], Sequence[Row]],
    collate: Collate,
    batch_size: int,
    columns: Sequence[str],
    what: str,
) -> PassLoader:
    """Micro-batches of passes over the data, checked before anything is trained on.

    Args:
        module: the algorithm in training.
        rows_of: the dataset of pass i.
        collate: turns rows into a batch.
        batch_size: rows of an optimiser step, over its micro-batches and ranks.
        columns: of the completions, which every row needs and which are encoded in each pass.
        what: the rows are to the user.

    Raises:
        InputError: the batch does not divide over devices and micro-batches, or rows are too few or lack a text.
    """
    if batch_size % (module.world_size * module.accumulate):
        raise InputError(
            f"algo.batch_size={batch_size} does not divide over {module.world_size} devices x "
            f"trainer.accumulate_grad_batches={module.accumulate}; change one of them"
        )
    first = rows_of(0)
    if len(first) < batch_size:
        raise InputError(f"{len(first)} {what} do not fill one batch of algo.batch_size={batch_size}")
    check_completions(first, columns, type(module).__name__)

    def encoded(iteration: int) -> Sequence[Row]:
        rows = rows_of(iteration)
        module.encoder.prepare(rows, columns)
        return rows

    return PassLoader(module, encoded, collate, batch_size)


class HeldOutLoader:
    """Held-out demonstrations or pairs in batches, this rank's share of them.

    Every rank has as many batches, see `PromptLoader`; what fills up is the first row without its tokens.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Collate,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.rows, self.collate = rows, collate
        self.plan = shares(len(rows), batch_size, rank, world_size)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[CompletionBatch | PreferenceBatch]:
        for index in self.plan:
            batch = self.collate([self.rows[i] for i in index or [0]])
            yield batch if index else batch.without_tokens()

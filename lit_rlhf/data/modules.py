"""Lightning data modules: rows for every algorithm; the algorithm decides what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_rlhf.data.rows import read_rows
from lit_rlhf.data.tasks import arithmetic_splits, demonstrations
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import exact_match, final_number, numeric_answer
from lit_rlhf.types import Row


@dataclass(frozen=True)
class _Room:
    """How long a row may be, how that is measured, and the words for it."""

    limit: int | None  # tokens
    length: Callable[[Row], int]
    what: str
    context: str
    advice: str


def _most_tokens(row: Row) -> int:
    return sum(len(text.encode()) for text in (row["prompt"], row.get("completion")) if isinstance(text, str)) + 4


class RowsDataModule(LightningDataModule):
    """Rows to train on and held-out rows to validate on.

    The module in training turns the rows into what it iterates over: rollouts of their prompts, or batches
    of their completions.

    Args:
        train_rows: dictionaries with a `"prompt"` and whatever columns the rewards name.
        held_out_rows: the same, for validation alone; see to it that they are not among `train_rows`. May be empty.
        reward_funcs: used where the algorithm was given none.
        validation_batch_size: prompts per validation batch.
        drop_long_prompts: leave out rows that the model cannot read instead of stopping; their number is told.
    """

    def __init__(
        self,
        train_rows: Sequence[Row],
        held_out_rows: Sequence[Row] = (),
        reward_funcs: Sequence[Any] = (),
        validation_batch_size: int = 256,
        drop_long_prompts: bool = False,
    ) -> None:
        super().__init__()
        self.train_rows, self.held_out_rows = list(train_rows), list(held_out_rows)
        self.reward_funcs, self.validation_batch_size = list(reward_funcs), validation_batch_size
        self.drop_long_prompts = drop_long_prompts

    def rows_of(self, iteration: int) -> Sequence[Row]:
        """The training rows of pass `iteration` over the data."""
        return self.train_rows

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module  # type: ignore[union-attr]

    def setup(self, stage: str) -> None:
        """Look for rows that do not fit the model, before anything is sampled or trained on."""
        module = self._module
        room = _Room(
            module.prompt_limit,
            lambda row: len(module.encode_prompt(row["prompt"])),
            "prompts",
            "the model's context less rollout.max_new_tokens leaves",
            "shorten them, lower rollout.max_new_tokens",
        )
        if module.rewards is not None or self.reward_funcs:  # else nothing is sampled in validation
            self.held_out_rows = self._fitting("held-out", self.held_out_rows, self.held_out_rows, room)
        if hasattr(module, "row_length"):  # it trains on the rows and not on rollouts of their prompts
            context = "the model's context is"
            room = _Room(module.row_limit, module.row_length, "rows with completion and EOS", context, "shorten them")
            self.train_rows = self._fitting("training", self.train_rows, self.rows_of(0), room)
        else:
            self.train_rows = self._fitting("training", self.train_rows, self.train_rows, room)

    def _fitting(self, which: str, rows: list[Row], measured: Sequence[Row], room: _Room) -> list[Row]:
        """The rows whose counterpart in `measured` fits."""
        if (limit := room.limit) is None:
            return rows
        # A token is a byte at least: most rows are seen to fit without encoding them.
        suspects = [i for i, row in enumerate(measured) if _most_tokens(row) > limit]
        lengths = {i: room.length(measured[i]) for i in suspects}
        long = {i: length for i, length in lengths.items() if length > limit}
        if long and not self.drop_long_prompts:
            raise InputError(
                f"{len(long)} of {len(rows)} {which} {room.what} do not fit the model: the longest has "
                f"{max(long.values())} tokens, and {room.context} {limit}; {room.advice}, or leave them out "
                f"with data.drop_long_prompts=true"
            )
        if len(long) == len(rows) and rows:
            raise InputError(f"none of the {len(rows)} {which} {room.what} fits the model's context; use another model")
        if long:
            print(f"left out {len(long)} of {len(rows)} {which} {room.what}, longer than {limit} tokens")
        return [row for i, row in enumerate(rows) if i not in long]

    def train_dataloader(self) -> Any:
        """The lazy view that the module in training makes of the rows."""
        return self._module.training_loader(self.rows_of)

    def val_dataloader(self) -> Any:
        """Batches of held-out prompts; none where there are no rows or no reward function."""
        if not self.held_out_rows or self._module.rewards is None:
            return []
        return self._module.validation_loader(self.held_out_rows, self.validation_batch_size)


class ArithmeticData(RowsDataModule):
    """The built-in task: addition problems, generated offline; right or wrong is decided by exact match.

    Args:
        difficulty: digits of the largest operand.
        held_out: problems kept for validation; they never occur in training, nor with the operands swapped.
        train_size: problems to train on; by default all others (20,000 at difficulty 3 and above).
        right_fraction: how often the demonstrations' tutor is right (SFT).
        seed: decides the split and the demonstrations.
        validation_batch_size: prompts per validation batch.
    """

    def __init__(
        self,
        difficulty: int = 2,
        held_out: int = 512,
        train_size: int | None = None,
        right_fraction: float = 0.5,
        seed: int = 0,
        validation_batch_size: int = 512,
    ) -> None:
        train, test = arithmetic_splits(difficulty, held_out, train_size, seed)
        super().__init__(train, test, [exact_match], validation_batch_size)
        self.right_fraction, self.seed = right_fraction, seed

    def rows_of(self, iteration: int) -> Sequence[Row]:
        """The problems with the tutor's answers of this pass: the same problem is right once and wrong once."""
        return demonstrations(self.train_rows, self.seed, self.right_fraction, iteration)


class FileData(RowsDataModule):
    """Prompts from a file.

    Rows with an `answer` column are verified by it unless the algorithm has reward functions of its own:
    numerically where every answer is a number (GSM8K), by exact match otherwise.

    Args:
        path: a `.jsonl` or `.json` file, see `read_rows`; GSM8K's own format is read as it comes.
        held_out: rows for validation, taken from the end of the file and not trained on (a row that the file repeats
            may be on both sides); by default a tenth, at most 256.
        validation_path: a file of its own for validation; then `held_out` takes nothing from `path`.
        validation_batch_size: prompts per validation batch.
        drop_long_prompts: leave out rows that the model cannot read instead of stopping; their number is told.
    """

    def __init__(
        self,
        path: str | Path,
        held_out: int | None = None,
        validation_path: str | Path | None = None,
        validation_batch_size: int = 64,
        drop_long_prompts: bool = False,
    ) -> None:
        rows = read_rows(path)
        if validation_path is not None:
            train, test = rows, read_rows(validation_path)
        else:
            count = min(256, len(rows) // 10) if held_out is None else held_out
            if not 0 <= count < len(rows):
                raise InputError(f"data.held_out={count} leaves nothing to train on: {path} has {len(rows)} rows")
            train, test = rows[: len(rows) - count], rows[len(rows) - count :]
        super().__init__(train, test, _verifier_of(rows), validation_batch_size, drop_long_prompts)


def _verifier_of(rows: Sequence[Row]) -> list[Any]:
    answers = [row["answer"] for row in rows if row.get("answer") is not None]
    if not answers:
        return []
    numbers = all(final_number(str(answer)) is not None for answer in answers)
    return [numeric_answer if numbers else exact_match]

"""Lightning data modules: rows for every algorithm; the algorithm decides what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_rlhf.data.rows import read_rows
from lit_rlhf.data.tasks import arithmetic_splits, demonstrations, preference_pairs
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
    completions = [row.get(column) for column in ("completion", "chosen", "rejected")]
    longest = max((len(text.encode()) for text in completions if isinstance(text, str)), default=0)
    return len(row["prompt"].encode()) + longest + 4


class RowsDataModule(LightningDataModule):
    """Rows to train on and held-out rows to validate on.

    The module in training turns the rows into what it iterates over: rollouts of their prompts, or batches of their
    completions or of pairs of them.

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
        if self._samples_held_out:
            self.held_out_rows = self._fitting("held-out", self.held_out_rows, self.held_out_rows, room)
        if hasattr(module, "row_length"):  # it trains on the rows and not on rollouts of their prompts
            context = "the model's context is"
            room = _Room(module.row_limit, module.row_length, "rows with completion and EOS", context, "shorten them")
            self.train_rows = self._fitting("training", self.train_rows, self.rows_of(0), room)
            if self._compares_held_out:
                self.held_out_rows = self._fitting("held-out", self.held_out_rows, self.held_out_rows, room)
        else:
            self.train_rows = self._fitting("training", self.train_rows, self.train_rows, room)

    @property
    def _compares_held_out(self) -> bool:
        """Whether the module in training validates on pairs."""
        return hasattr(self._module, "compare")

    @property
    def _samples_held_out(self) -> bool:
        """Whether it samples completions in validation, which takes a reward function to judge them."""
        judged = self._module.rewards is not None or bool(self.reward_funcs)
        return judged and getattr(self._module, "samples_in_validation", True)

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
        """Batches of held-out prompts or pairs; none where there are no rows, or nothing to judge samples by."""
        if not self.held_out_rows or not (self._compares_held_out or self._samples_held_out):
            return []
        return self._module.validation_loader(self.held_out_rows, self.validation_batch_size)


class ArithmeticData(RowsDataModule):
    """The built-in task: addition problems, generated offline; right or wrong is decided by exact match.

    Args:
        difficulty: digits of the largest operand.
        held_out: problems kept for validation; they never occur in training, nor with the operands swapped.
        train_size: problems to train on; by default all others (20,000 at difficulty 3 and above).
        right_fraction: how often the demonstrations' tutor is right (SFT).
        fixed_pairs: reject the same wrong answers in every pass (preferences), as `algo.reference_cache` needs it.
        seed: decides the split, the demonstrations and the pairs.
        validation_batch_size: prompts per validation batch.
    """

    def __init__(
        self,
        difficulty: int = 2,
        held_out: int = 512,
        train_size: int | None = None,
        right_fraction: float = 0.5,
        fixed_pairs: bool = False,
        seed: int = 0,
        validation_batch_size: int = 512,
    ) -> None:
        train, test = arithmetic_splits(difficulty, held_out, train_size, seed)
        super().__init__(train, preference_pairs(test, seed), [exact_match], validation_batch_size)
        self.right_fraction, self.fixed_pairs, self.seed = right_fraction, fixed_pairs, seed

    def rows_of(self, iteration: int) -> Sequence[Row]:
        """The problems with the tutor's answers of this pass: the same problem is right once and wrong once.

        `completion` is a demonstration; `chosen` is the right answer and `rejected` a wrong one.
        """
        shown = demonstrations(self.train_rows, self.seed, self.right_fraction, iteration)
        return preference_pairs(shown, self.seed, 0 if self.fixed_pairs else iteration)


class FileData(RowsDataModule):
    """Prompts from a file, with completions to imitate or to compare where the algorithm wants them.

    `completion` is a demonstration (SFT); `chosen` and `rejected` are a pair (preferences), with a `margin` if there is
    one. Rows with an `answer` column are verified by it unless the algorithm has reward functions of its own:
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

"""Lightning data modules: rows for every algorithm; the algorithm decides what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_rlhf.data.columns import (
    check_completions,
    check_substance,
    complete_rows,
    conventional,
    of_one_kind,
    presented,
)
from lit_rlhf.data.lengths import LONG_ROWS, LongRows, Room, room_of_prompts, room_of_rows, rows_too_long
from lit_rlhf.data.sources import read_splits
from lit_rlhf.data.tasks import arithmetic_splits, demonstrations, preference_pairs
from lit_rlhf.errors import InputError, check_choice, check_number
from lit_rlhf.rewards import exact_match, numeric_answer
from lit_rlhf.rewards.verifiers import reference_number
from lit_rlhf.types import Row


class RowsDataModule(LightningDataModule):
    r"""Rows to train on and held-out rows to validate on.

    The module in training turns the rows into what it iterates over: rollouts of their prompts, or batches of their
    completions or of pairs of them.

    Args:
        train_rows: dictionaries with a `"prompt"` and whatever columns the rewards name.
        held_out_rows: the same, for validation alone; see to it that they are not among `train_rows`. May be empty.
        reward_funcs: used where the algorithm was given none.
        validation_batch_size: prompts per validation batch.
        long_rows: what to do with rows that the model cannot read: `"stop"` before training, `"drop"` them or
            `"truncate"` them: prompts lose their beginning but BOS, completions their end with EOS. Their number is
            told and logged. Reward functions see whole prompts.
        token_cache: a folder in which the token ids are kept, and found by the next run with these rows and tokenizer.
        prompt_template: what every prompt is put into, at `{prompt}`, as `"Question: {prompt}\nAnswer:"`; of chat
            messages the last. It is used as it is; on the command line alone a backslash and an n are a new line.
        system_prompt: makes chat messages of plain rows, and begins those with this message that have none of their
            own; `""` makes messages without one.
    """

    def __init__(
        self,
        train_rows: Sequence[Row],
        held_out_rows: Sequence[Row] = (),
        reward_funcs: Sequence[Any] = (),
        validation_batch_size: int = 256,
        long_rows: LongRows = "stop",
        token_cache: str | Path | None = None,
        prompt_template: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("data.long_rows", long_rows, LONG_ROWS)
        check_number("data.validation_batch_size", validation_batch_size, at_least=1)
        if prompt_template is not None and "{prompt}" not in prompt_template:
            raise InputError(f"data.prompt_template={prompt_template!r} has no {{prompt}}, where the prompt is put")
        parts = [
            [presented(conventional(row, f"{which} row {n}"), prompt_template, system_prompt) for n, row in numbered]
            for which, numbered in (("training", enumerate(train_rows, 1)), ("held-out", enumerate(held_out_rows, 1)))
        ]
        self.train_rows, self.held_out_rows = of_one_kind(*parts)
        self.reward_funcs, self.validation_batch_size = list(reward_funcs), validation_batch_size
        self.long_rows, self.token_cache = long_rows, token_cache
        self._told: set[str] = set()

    def rows_of(self, iteration: int) -> Sequence[Row]:
        """The training rows of pass `iteration` over the data."""
        return self.train_rows

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module  # type: ignore[union-attr]

    def setup(self, stage: str) -> None:
        """Encode all rows, and look for those that do not fit the model, before anything is sampled or trained on.

        Raises:
            InputError: there are no rows to train on, or some do not fit the model and `long_rows="stop"`.
        """
        module, columns, first = self._module, self._module.completion_columns, self.rows_of(0)
        if stage == "fit" and not first:
            raise InputError("data: there are no rows to train on; lower data.held_out, or give more rows")
        check_completions(first, columns, type(module).__name__)
        check_substance(complete_rows(self.held_out_rows, columns), columns, "held-out rows")
        module.encoder.truncate = self.long_rows == "truncate"
        module.encoder.prepare(first, columns, folder=self.token_cache)
        module.encoder.prepare(self.held_out_rows, columns, "held-out", self.token_cache)
        prompts, rows = room_of_prompts(module), room_of_rows(module)
        self.train_rows = self._fitting("training", self.train_rows, first, rows if columns else prompts)
        for judged, room in ((self._samples_held_out, prompts), (self._reads_held_out, rows)):
            if judged:
                self.held_out_rows = self._fitting("held-out", self.held_out_rows, self.held_out_rows, room)

    @property
    def _reads_held_out(self) -> bool:
        """Whether the module in training validates on completions that are given: demonstrations or pairs."""
        columns = self._module.completion_columns
        return bool(columns and complete_rows(self.held_out_rows, columns))

    @property
    def _samples_held_out(self) -> bool:
        """Whether it samples completions in validation, which takes a reward function to judge them."""
        judged = self._module.rewards is not None or bool(self.reward_funcs)
        return judged and getattr(self._module, "samples_in_validation", True)

    def _fitting(self, which: str, rows: list[Row], measured: Sequence[Row], room: Room) -> list[Row]:
        """The rows that are used: those whose counterpart in `measured` fits, unless the others are cut."""
        long = rows_too_long(measured, room, which, self.long_rows)
        if long and (told := f"{which} {room.what}") not in self._told:
            self._told.add(told)
            done = "left out" if self.long_rows == "drop" else "cut"
            if self.trainer.is_global_zero:  # type: ignore[union-attr]
                print(f"{done} {len(long)} of {len(rows)} {which} {room.what}, longer than {room.limit} tokens")
            for logger in self.trainer.loggers:  # type: ignore[union-attr]
                logger.log_metrics({f"data/long_{which.replace('-', '_')}_rows": float(len(long))}, step=0)
        return rows if self.long_rows == "truncate" else [row for i, row in enumerate(rows) if i not in long]

    def train_dataloader(self) -> Any:
        """The lazy view that the module in training makes of the rows."""
        return self._module.training_loader(self.rows_of)

    def val_dataloader(self) -> Any:
        """Batches of held-out prompts or pairs; none where there are no rows, or nothing to judge samples by."""
        if not self.held_out_rows or not (self._reads_held_out or self._samples_held_out):
            return []
        return self._module.validation_loader(self.held_out_rows, self.validation_batch_size)


class ArithmeticData(RowsDataModule):
    """The built-in task: addition problems, generated offline; right or wrong is decided by exact match.

    Args:
        difficulty: most digits of an operand; a list of levels mixes problems whose larger operand has exactly as many
            digits, each with its level in a column `difficulty`.
        held_out: problems kept for validation; they never occur in training, nor with the operands swapped.
        train_size: problems to train on; by default all others (20,000 at difficulty 3 and above). Of levels both
            sizes are those of each level; a list gives every level its own.
        right_fraction: how often the demonstrations' tutor is right (SFT).
        fixed_pairs: reject the same wrong answers in every pass (preferences), as `algo.reference_cache` needs it.
        seed: decides the split, the demonstrations and the pairs.
        validation_batch_size: prompts per validation batch.
    """

    def __init__(
        self,
        difficulty: int | Sequence[int] = 2,
        held_out: int | Sequence[int] = 512,
        train_size: int | Sequence[int] | None = None,
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
    """Rows from a file, a folder or the Hub: prompts, with completions to imitate or compare where those are wanted.

    Columns have the Hub's names, see `lit_rlhf.data.columns`: `completion` is a demonstration (SFT); `chosen` and
    `rejected` are a pair (preferences), with a `margin` if there is one. Rows with an `answer` column are verified by
    it unless the algorithm has reward functions of its own: numerically where every answer is a number and nothing
    else (GSM8K), by exact match otherwise: for 1/2 or x = 3 give `math_expression`.

    Args:
        path: a `.jsonl`, `.json` or `.parquet` file, a folder or a dataset's name on the Hub, see `read_rows`; GSM8K's
            own format is read as it comes.
        name: the configuration of a dataset that has several.
        split: the rows to train on, of a folder or a dataset of the Hub.
        validation_split: the rows to validate on; by default the validation or test split, where there is one.
        columns: our name of a column -> the one that the data has, as in `{"prompt": "question", "answer": "target"}`.
        held_out: rows for validation: the first of the validation split or file, by default all; where there is
            neither, the last rows, which are not trained on (one that the data repeats may be on both sides), by
            default a tenth and at most 256.
        validation_path: a file, folder or dataset of its own for validation, in which `name` and `validation_split`
            choose, too.
        validation_batch_size: prompts per validation batch.
        long_rows: see `RowsDataModule`.
        token_cache: see `RowsDataModule`.
        prompt_template: see `RowsDataModule`.
        system_prompt: see `RowsDataModule`.
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        split: str = "train",
        validation_split: str | None = None,
        columns: Mapping[str, str] | None = None,
        held_out: int | None = None,
        validation_path: str | Path | None = None,
        validation_batch_size: int = 64,
        long_rows: LongRows = "stop",
        token_cache: str | Path | None = None,
        prompt_template: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        check_number("data.held_out", held_out or 0, at_least=0)
        train, test = read_splits(
            path, columns, name=name, split=split, validation_split=validation_split, validation_path=validation_path
        )
        if test is not None:
            test = test[:held_out]
        else:
            count = min(256, len(train) // 10) if held_out is None else held_out
            if not 0 <= count < len(train):
                raise InputError(f"data.held_out={count} leaves nothing to train on: {path} has {len(train)} rows")
            train, test = train[: len(train) - count], train[len(train) - count :]
        verifiers = _verifier_of([*train, *test])
        super().__init__(
            train, test, verifiers, validation_batch_size, long_rows, token_cache, prompt_template, system_prompt
        )


def _verifier_of(rows: Sequence[Row]) -> list[Any]:
    answers = [row["answer"] for row in rows if row.get("answer") is not None]
    if not answers:
        return []
    numbers = all(reference_number(str(answer)) is not None for answer in answers)
    return [numeric_answer if numbers else exact_match]

"""Verifiable tasks of the reasoning_gym library (extra `reasoning_gym`), with its own generators and scorers."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lit_rlhf.data.lengths import LongRows
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError, check_number
from lit_rlhf.rewards import text_of
from lit_rlhf.signatures import nearest
from lit_rlhf.types import Row

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_MARKED = re.compile(r".*\banswer:", re.DOTALL | re.IGNORECASE)
_OURS = {"seed": "seed", "size": "train_size=... and data.held_out"}


class ReasoningGymData(RowsDataModule):
    """Problems of one task of reasoning_gym, scored by the task's own scorer.

    A completion's answer is found by `extract_answer`. The score is from 0 to 1, with part of it for answers that are
    nearly right; accuracy counts those with a score of 1.

    Args:
        task: its name in the library, as `"chain_sum"`.
        params: the task's own parameters, which decide its difficulty, as `{"min_digits": 1, "max_digits": 2}`.
        train_size: problems to train on, all different; fewer where the task has not so many, which is told.
        held_out: problems kept for validation; none of them occurs in training.
        seed: decides the problems. Those to train on and the held-out ones are drawn with seeds of their own.
        prompt_template: see `RowsDataModule`; a model that does not guess how to answer is told here.
        system_prompt: see `RowsDataModule`.
        validation_batch_size: prompts per validation batch.
        long_rows: see `RowsDataModule`.
        token_cache: see `RowsDataModule`.

    Raises:
        InputError: the library is not installed, or has no such task; the task no such parameter, or not that value.
    """

    def __init__(
        self,
        task: str,
        params: Mapping[str, Any] | None = None,
        train_size: int = 2000,
        held_out: int = 256,
        seed: int = 0,
        prompt_template: str | None = None,
        system_prompt: str | None = None,
        validation_batch_size: int = 256,
        long_rows: LongRows = "stop",
        token_cache: str | Path | None = None,
    ) -> None:
        check_number("data.train_size", train_size, at_least=1)
        check_number("data.held_out", held_out, at_least=0)
        test = _problems(task, params or {}, held_out, f"{seed}/held-out", frozenset())
        train = _problems(task, params or {}, train_size, f"{seed}/train", {row["prompt"] for row in test})
        if not train:
            raise InputError(
                f"data.task={task}: all of its {len(test)} problems are held out; give a smaller data.held_out"
            )
        for what, rows, size in (("training", train, train_size), ("held-out", test, held_out)):
            if len(rows) < size:
                print(f"{task} has {len(rows)} different {what} problems instead of {size}")
        super().__init__(
            train,
            test,
            [ReasoningGymScore(task, params)],
            validation_batch_size,
            long_rows,
            token_cache,
            prompt_template,
            system_prompt,
        )


class ReasoningGymScore:
    """The reward function: the task's own score of a completion's answer, from 0 to 1.

    It reads the columns `question`, `answer` and `metadata`, as `ReasoningGymData` has them. An answer at which the
    scorer fails, because it is nothing like one, scores 0.

    Args:
        task: its name in the library.
        params: the task's own parameters, as the problems were made with.
    """

    verifies = True

    def __init__(self, task: str, params: Mapping[str, Any] | None = None) -> None:
        self.__name__ = task
        self._dataset = _dataset(task, params or {}, 0, 1)

    def __call__(
        self,
        completions: Sequence[Any],
        question: Sequence[str],
        answer: Sequence[Any],
        metadata: Sequence[Any],
        **_: Any,
    ) -> list[float]:
        """The score of each completion."""
        entries = zip(question, answer, metadata, strict=True)
        problems = [{"question": q, "answer": a, "metadata": m} for q, a, m in entries]
        return [self._score(text_of(c), entry) for c, entry in zip(completions, problems, strict=True)]

    @staticmethod
    def answer(completion: str) -> str:
        """What votes in a majority vote."""
        return extract_answer(completion)

    def _score(self, completion: str, entry: dict[str, Any]) -> float:
        try:
            return float(self._dataset.score_answer(extract_answer(completion), entry))
        except Exception:  # scorers read answers with int(), json, sympy, ...
            return 0.0


def extract_answer(completion: str) -> str:
    """What stands in the last `<answer>...</answer>`, or behind the last `Answer:`, or else the whole completion.

    >>> extract_answer("2 and 2. <answer> 4 </answer>"), extract_answer("Thus the answer: 4"), extract_answer(" 4")
    ('4', '4', '4')
    """
    tagged = _TAGGED.findall(completion)
    return (tagged[-1] if tagged else _MARKED.sub("", completion, count=1)).strip()


def _problems(task: str, params: Mapping[str, Any], count: int, seed: str, taken: Any) -> list[Row]:
    """At most `count` different problems that are not `taken`, from twice as many drawn."""
    if not count:
        return []
    start = random.Random(seed).getrandbits(31)  # problem i of seed s is problem 0 of seed s + i: seeds must lie apart
    dataset, found = _dataset(task, params, start, 2 * count), {}
    for i in range(2 * count):
        entry = dataset[i]
        question = str(entry["question"])
        if question not in taken:
            found[question] = {**entry, "prompt": question}
        if len(found) == count:
            break
    return [{name: row[name] for name in ("prompt", "question", "answer", "metadata")} for row in found.values()]


def _dataset(task: str, params: Mapping[str, Any], seed: int, size: int) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise InputError(
            "data=reasoning_gym needs the package reasoning_gym: pip install 'lit_rlhf[reasoning_gym]'"
        ) from None
    if task not in DATASETS:
        raise InputError(f"data.task: reasoning_gym has no task {task!r}{nearest(task, DATASETS)}")
    known = [field.name for field in fields(DATASETS[task][1]) if field.name not in _OURS]
    for name in params:
        if name in _OURS:
            raise InputError(f"data.params: {name!r} is not the task's own; give data.{_OURS[name]}=...")
        if name not in known:
            raise InputError(f"data.params: {task} has no parameter {str(name)!r}{nearest(str(name), known)}")
    try:
        return create_dataset(task, seed=seed, size=size, **params)
    except Exception as error:  # the tasks assert what they need, or fail at a value of the wrong kind
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        raise InputError(f"data.params: {task} refuses {dict(params)}: {reason}") from error

"""Rewards for the form of a completion: its format, its length, its repetitions. Each call makes a reward function.

They are added to a reward for what it says, with a weight; on the command line
`'reward.funcs=[lit_rlhf.rewards.numeric_answer,{_target_: lit_rlhf.rewards.overlong, max_length: 256, buffer: 64}]'`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lit_rlhf.errors import InputError, check_number
from lit_rlhf.functional import overlong_penalty
from lit_rlhf.rewards.calling import wanted
from lit_rlhf.rewards.resolving import RewardFunction, name_of, resolve
from lit_rlhf.rewards.verifiers import text_of

_Rewards = Callable[..., list[float]]


def regex_format(pattern: str) -> _Rewards:
    r"""1.0 where the whole completion matches a regular expression, white space around it aside, else 0.0.

    Args:
        pattern: in Python's syntax; `.` stands for line breaks, too.

    Raises:
        InputError: a pattern that is no regular expression.

    >>> regex_format(r"<think>.*</think>\s*\d+")(completions=["<think>3\n+4</think> 7", "7"])
    [1.0, 0.0]
    """
    try:
        return partial(_regex_format, expression=re.compile(pattern, re.DOTALL))
    except (re.error, TypeError) as error:
        raise InputError(f"regex_format: {pattern!r} is no regular expression, {error}") from error


def _regex_format(completions: Sequence[Any], expression: re.Pattern[str], **_: Any) -> list[float]:
    return [float(expression.fullmatch(text_of(completion).strip()) is not None) for completion in completions]


def repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> _Rewards:
    """The share of a completion's n-grams of tokens that repeat an earlier one, times `max_penalty`.

        P · (1 − #different / #all)

    After the repetition penalty of "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373, appendix), which
    is taken from every repeated token; here it is one number per completion. 0 for completions shorter than an n-gram.

    Args:
        ngram_size: n, in tokens.
        max_penalty: P, at most 0.

    Raises:
        InputError: a `max_penalty` above 0.

    >>> repetition_penalty(ngram_size=2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5], [5]])
    [0.0, -0.75, 0.0]
    """
    check_number("repetition_penalty: ngram_size", ngram_size, at_least=1)
    check_number("repetition_penalty: max_penalty", max_penalty)
    if max_penalty > 0:
        raise InputError(f"repetition_penalty: max_penalty must be at most 0, got {max_penalty}")
    return partial(_repetition_penalty, ngram_size=ngram_size, max_penalty=max_penalty)


def _repetition_penalty(
    completion_ids: Sequence[Sequence[int]], ngram_size: int, max_penalty: float, **_: Any
) -> list[float]:
    found = []
    for ids in completion_ids:
        ngrams = [tuple(ids[i : i + ngram_size]) for i in range(len(ids) - ngram_size + 1)]
        repeated = len(ngrams) - len(set(ngrams))
        found.append(max_penalty * repeated / len(ngrams) if repeated else 0.0)
    return found


def overlong(max_length: int, buffer: int) -> _Rewards:
    """DAPO's soft punishment of long completions, see `functional.overlong_penalty`: from 0 down to -1.

    Args:
        max_length: tokens; give `rollout.max_new_tokens`.
        buffer: the last tokens before it, over which the penalty grows.

    Raises:
        InputError: a buffer below 0 or above `max_length`.

    >>> overlong(max_length=4, buffer=2)(completion_ids=[[1, 2], [1, 2, 3], [1, 2, 3, 4]])
    [0.0, -0.5, -1.0]
    """
    if not 0 <= buffer <= max_length:
        raise InputError(f"overlong: buffer must be from 0 to max_length={max_length}, got {buffer}")
    return partial(_overlong, max_length=max_length, buffer=buffer)


def _overlong(completion_ids: Sequence[Sequence[int]], max_length: int, buffer: int, **_: Any) -> list[float]:
    lengths = torch.tensor([len(ids) for ids in completion_ids], dtype=torch.long)
    return [penalty + 0.0 for penalty in overlong_penalty(lengths, max_length, buffer).tolist()]  # no -0.0


def cosine_length(
    verifier: RewardFunction | str,
    max_length: int,
    correct: Sequence[float] = (2.0, 1.0),
    wrong: Sequence[float] = (-10.0, 0.0),
    exceeded: float = -10.0,
) -> RewardFunction:
    """The cosine length reward (arXiv 2502.03373): right is better short, and wrong is better long.

        r_L + (r_0 − r_L) (1 + cos(π |o| / L)) / 2 for |o| < L, of the right or of the wrong; `exceeded` from L on

    Args:
        verifier: says what is right, with a reward above 0; where it is `None` so is this one.
        max_length: L, in tokens; give `rollout.max_new_tokens`.
        correct: (r_0, r_L) of a right completion: that of length 0, and that of length L.
        wrong: the same of a wrong one.
        exceeded: of a completion that fills L.

    Raises:
        InputError: a range that is not two numbers.

    >>> from lit_rlhf.rewards import exact_match
    >>> reward = cosine_length(exact_match, max_length=4)
    >>> reward(completions=["7", "7", "8", "7"], completion_ids=[[], [1, 2], [1, 2], [1] * 4], answer=["7"] * 4)
    [2.0, 1.5, -5.0, -10.0]
    """
    check_number("cosine_length: max_length", max_length, at_least=1)
    for name, pair in (("correct", correct), ("wrong", wrong)):
        if len(pair) != 2:
            raise InputError(f"cosine_length: {name} must be two numbers, at length 0 and at max_length, got {pair}")
    return _CosineLength(resolve(verifier), max_length, (correct[0], correct[1]), (wrong[0], wrong[1]), exceeded)


class _CosineLength:
    """See `cosine_length`; it names what its verifier names."""

    __name__ = "cosine_length"

    def __init__(
        self,
        verifier: RewardFunction,
        max_length: int,
        correct: tuple[float, float],
        wrong: tuple[float, float],
        exceeded: float,
    ) -> None:
        self.verifier, self.max_length = verifier, max_length
        self.correct, self.wrong, self.exceeded = correct, wrong, exceeded
        own = inspect.Parameter("completion_ids", inspect.Parameter.KEYWORD_ONLY)
        named = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(verifier).parameters.values()}
        rest = [p for p in inspect.signature(verifier).parameters.values() if p.kind is p.VAR_KEYWORD]
        named = {name: p for name, p in named.items() if name not in {p.name for p in rest}}
        self.__signature__ = inspect.Signature([*({**named, "completion_ids": own}).values(), *rest])

    def __call__(self, completion_ids: Sequence[Sequence[int]], **keywords: Any) -> list[float | None]:
        offered = {**keywords, "completion_ids": completion_ids}
        right = self.verifier(**{key: offered[key] for key in wanted(self.verifier, name_of(self.verifier), offered)})
        pairs = zip(right, completion_ids, strict=True)
        return [None if reward is None else self._scaled(reward > 0, len(ids)) for reward, ids in pairs]

    def _scaled(self, right: bool, length: int) -> float:
        if length >= self.max_length:
            return self.exceeded
        start, end = self.correct if right else self.wrong
        return end + (start - end) * (1 + math.cos(math.pi * length / self.max_length)) / 2

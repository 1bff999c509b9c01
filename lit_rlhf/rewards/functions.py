"""Reward functions: TRL's signature, called with the keywords they name, checked, weighted and summed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lit_rlhf.errors import InputError, check_number
from lit_rlhf.rewards.calling import LARGEST, TOLD, answer, awaited, call, numbers, wanted
from lit_rlhf.rewards.resolving import SCORED, RewardFunction, name_of, resolve, unique, unwrapped
from lit_rlhf.types import Row

Described: TypeAlias = RewardFunction | str | Mapping[str, Any] | nn.Module
F = TypeVar("F", bound=RewardFunction)

TIMEOUT = 300.0  # seconds; well below the ten minutes after which ranks that wait for another one give up


@overload
def verifier(fn: F) -> F: ...
@overload
def verifier(*, answer: Callable[[str], Hashable | None]) -> Callable[[F], F]: ...
def verifier(fn: F | None = None, *, answer: Callable[[str], Hashable | None] | None = None) -> Any:
    """Mark a reward function as one that tells right (1.0) from wrong (0.0): accuracy is read off it.

    `@verifier`, or `@verifier(answer=final_number)` to say what in a completion is the answer, so that completions
    can vote: equal answers are one, `None` is no answer. Without it the whole completion votes, but for white space
    around it.

    >>> @verifier
    ... def even(completions, **columns):
    ...     return [float(int(text) % 2 == 0) for text in completions]
    >>> rewards = RewardFunctions([even])
    >>> total, parts = rewards(["1+1=", "1+2="], ["2", "3"], [[5], [6]], {})
    >>> rewards.accuracy(parts)
    tensor([1., 0.])
    """
    if fn is None:
        return partial(_marked, answer=answer)
    return _marked(fn, answer)


def _marked(fn: F, answer: Callable[[str], Hashable | None] | None) -> F:
    fn.verifies, fn.answer = True, answer  # type: ignore[attr-defined]
    return fn


@dataclass(frozen=True)
class TrainerState:
    """Where training stands, for reward functions that name `trainer_state`: these fields of Transformers' own."""

    global_step: int = 0  # optimiser steps taken
    epoch: float = 0.0  # passes over the prompts
    max_steps: int = -1  # optimiser steps of the whole run; -1 where its end is not known
    num_train_epochs: int = 0  # passes over the prompts, begun ones too, of the whole run; 0 where not known
    is_world_process_zero: bool = True


class DataRewards:
    """Stands for the data module's own reward functions, where no others are given.

    Args:
        timeout: seconds that each may take for one call; None for no limit.
    """

    def __init__(self, timeout: float | None = TIMEOUT) -> None:
        check_timeout(timeout)
        self.timeout = timeout


class RewardFunctions:
    """A weighted sum of reward functions.

    A reward function has TRL's signature, `fn(prompts, completions, completion_ids=None, **columns) ->
    list[float | None]`, one number per completion; `None` says that it does not apply to that row. It is
    called with keywords, and only with those it names unless it takes `**kwargs`: `prompts`, `completions`,
    `completion_ids`, the dataset's columns but `prompt`, `completion` and its ids, `trainer_state`,
    `log_metric(name, value)` and `log_extra(column, values)`. Where a prompt is a list of chat messages its completion
    is one, too: `[{"role": "assistant", "content": text}]`. Asynchronous functions run at the same time.

    Args:
        funcs: one or several of: a function, an object or a class that can be called; an import string
            ("my_file.my_function"; the current directory is searched first, as `python -m` does, and stays on
            `sys.path`); a reward model, or a string that is its folder or has a "/", its Hub name, see `RewardModel`;
            a mapping with an import string as its `_target_` and arguments: those of a reward function are fixed, a
            class or anything else that makes reward functions is called with them.
        weights: one per function; all 1 if not given. A function of weight 0 is only reported.
        timeout: seconds that a function may take for one call, after which the run ends with a sentence; None for no
            limit.

    Attributes:
        names: one unique name per function, for logging: a repeated one gets `_2`, `_3`, ...
        trainer_state: what functions are told about where training stands; whoever trains sets it.
        metrics: what functions logged during the last call, `"function/name"` to its values.
        extras: columns that they logged during the last call, `"function/column"` to its values.

    Raises:
        InputError: for a function that cannot be found or called, and for weights that do not fit.

    >>> def short(completions, **kwargs):
    ...     return [-len(c) for c in completions]
    >>> rewards = RewardFunctions([short, "lit_rlhf.rewards.exact_match"], weights=[0.1, 1])
    >>> total, parts = rewards(["1+1=", "1+2="], ["2", "44"], [[5], [7, 7]], {"answer": ["2", "3"]})
    >>> total
    tensor([ 0.9000, -0.2000])
    >>> rewards.names, rewards.accuracy(parts)
    (['short', 'exact_match'], tensor([1., 0.]))
    """

    def __init__(
        self,
        funcs: Described | Sequence[Described],
        weights: Sequence[float] | None = None,
        timeout: float | None = TIMEOUT,
    ) -> None:
        one = callable(funcs) or isinstance(funcs, str | Mapping)
        if not (one or isinstance(funcs, Sequence)):
            raise InputError(f"reward functions: give callables or import strings, got {funcs!r}")
        given: list[Any] = [funcs] if one else list(funcs)  # type: ignore[arg-type]
        if not given:
            raise InputError("reward functions: at least one is needed, got none")
        check_timeout(timeout)
        self.funcs = [resolve(fn) for fn in given]
        self.names = unique([name_of(fn) for fn in self.funcs])
        self.weights, self.timeout = _check_weights(weights, self.names), timeout
        self.trainer_state = TrainerState()
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
    ) -> tuple[Tensor, Tensor]:
        """Score N completions.

        Args:
            prompts: N texts, or N lists of chat messages.
            completions: N texts.
            completion_ids: their token ids.
            columns: of the dataset, N values each.

        Returns:
            The weighted sum `[N]` over the functions that apply, NaN where none does but those of weight 0, and each
            function's rewards `[N, F]`, NaN where it does not apply; both float32.

        Raises:
            InputError: a function raised, hung, needs a column that is not there, or returned something other
                than N finite numbers or `None`s.
        """
        self.metrics, self.extras = {}, {}
        answers = [answer(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        offered: dict[str, Any] = {name: columns[name] for name in _offered(columns)}
        offered |= {"prompts": list(prompts), "completions": answers, "completion_ids": list(completion_ids)}
        returned = self._returned(offered)
        rewards = [numbers(found, len(completions), name) for name, found in returned.items()]
        parts = torch.tensor(rewards, dtype=torch.float32).T.contiguous()
        weights, absent = torch.tensor(self.weights, dtype=torch.float32), parts.isnan()
        total = torch.where(absent, 0.0, parts) @ weights
        return torch.where((absent | (weights == 0)).all(1), torch.nan, total), parts

    def _returned(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """What each function returns; the asynchronous ones are awaited when the others are done, all together."""
        returned: dict[str, Any] = {}
        try:
            for fn, name in zip(self.funcs, self.names, strict=True):
                logs = {"log_extra": partial(self._log_extra, name), "log_metric": partial(self._log_metric, name)}
                keywords = {**offered, "trainer_state": self.trainer_state, **logs}
                returned[name] = call(fn, name, keywords, self.timeout)
        except BaseException:
            for found in returned.values():
                if inspect.iscoroutine(found):
                    found.close()  # or Python warns that it was never awaited
            raise
        later = {name: found for name, found in returned.items() if inspect.isawaitable(found)}
        return returned | awaited(later, self.timeout)

    def _log_metric(self, function: str, name: str, value: float) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.inf
        if math.isinf(number):
            raise InputError(f"reward function {function} logged {value!r} as {name!r}; expected a finite number")
        self.metrics.setdefault(f"{function}/{name}", []).append(number)

    def _log_extra(self, function: str, column: str, values: Sequence[Any]) -> None:
        self.extras.setdefault(f"{function}/{column}", []).extend(values)

    def check(self, rows: Sequence[Row]) -> None:
        """Look for what can be known before anything is sampled.

        Raises:
            InputError: a function needs a column that the rows do not have, or a reward model cannot read the prompts.
        """
        if not rows:
            return
        for fn, name in zip(self.funcs, self.names, strict=True):
            wanted(fn, name, [*_offered(rows[0]), *SCORED, *TOLD])
            if hasattr(fn, "check_prompts"):
                fn.check_prompts([row["prompt"] for row in rows])

    def to(self, device: torch.device | str) -> RewardFunctions:
        """Move the reward models to `device`."""
        for fn in self.funcs:
            if hasattr(fn, "to"):
                fn.to(device)
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """Hold the reward models in shards over the ranks of the mesh."""
        for fn in self.funcs:
            if hasattr(fn, "shard"):
                fn.shard(mesh)

    def accuracy(self, parts: Tensor) -> Tensor | None:
        """`[N]`, 1 where the first verifier's column of `parts` `[N, F]` is 1, else 0; `None` if no function is one."""
        for column, fn in enumerate(self.funcs):
            if getattr(unwrapped(fn), "verifies", False):
                return solved(parts[:, column])
        return None


def _offered(columns: Iterable[str]) -> list[str]:
    """The columns of the data that functions are offered, as in TRL: none that says the same of another completion."""
    return [name for name in columns if name not in ("prompt", "completion", "completion_ids")]


def solved(score: Tensor) -> Tensor:
    """1 for a score of 1 and 0 for less, such as part of the points for an answer that is nearly right; NaN stays."""
    return torch.where(score.isnan(), score, (score >= 1).to(score.dtype))


def reward_functions(
    funcs: RewardFunctions | DataRewards | Described | Sequence[Described] | None,
    weights: Sequence[float] | None = None,
    timeout: float | None = TIMEOUT,
) -> RewardFunctions | DataRewards:
    """Whatever describes rewards, as `RewardFunctions`; `DataRewards` where nothing is given.

    Raises:
        InputError: see `RewardFunctions`; also for weights without functions, or beside those that have their own.
    """
    if weights is not None and (funcs is None or isinstance(funcs, DataRewards)):
        raise InputError("reward weights: there are no reward functions to weight; give those too")
    if weights is not None and isinstance(funcs, RewardFunctions):
        raise InputError("reward weights belong to funcs: give them to RewardFunctions(funcs, weights)")
    if funcs is None:
        return DataRewards(timeout)
    if isinstance(funcs, RewardFunctions | DataRewards):
        return funcs
    return RewardFunctions(funcs, weights, timeout)


def check_timeout(timeout: float | None) -> None:
    """Refuse a timeout that is neither None nor a positive number."""
    check_number("reward.timeout", 1.0 if timeout is None else timeout, above=0)


def _check_weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise InputError(f"reward weights: {len(names)} needed, one for each of {', '.join(names)}, got {len(weights)}")
    for weight, name in zip(weights, names, strict=True):
        if not isinstance(weight, int | float) or not abs(weight) <= LARGEST:
            raise InputError(f"reward weights: the weight of {name} must be a finite number, got {weight!r}")
    if not any(weights):
        raise InputError("reward weights: all of them are 0, and nothing could be learnt; give one function a weight")
    return [float(weight) for weight in weights]

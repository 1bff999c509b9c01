"""Reward functions: TRL's signature, called with the keywords they name, checked, weighted and summed."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from lit_rlhf.errors import InputError

RewardFunction = Callable[..., Any]
F = TypeVar("F", bound=RewardFunction)

_LARGEST = torch.finfo(torch.float32).max


@overload
def verifier(fn: F) -> F: ...
@overload
def verifier(*, answer: Callable[[str], Hashable | None]) -> Callable[[F], F]: ...
def verifier(fn: F | None = None, *, answer: Callable[[str], Hashable | None] | None = None) -> Any:
    """Mark a reward function as one that tells right (1.0) from wrong (0.0): accuracy is read off it.

    `@verifier`, or `@verifier(answer=final_number)` to say what in a completion is the answer, so that completions
    can vote: equal answers are one, `None` is no answer. Without it the whole completion votes, but for white space
    around it.
    """
    if fn is None:
        return functools.partial(_marked, answer=answer)
    return _marked(fn, answer)


def _marked(fn: F, answer: Callable[[str], Hashable | None] | None) -> F:
    fn.verifies, fn.answer = True, answer  # type: ignore[attr-defined]
    return fn


class RewardFunctions:
    """A weighted sum of reward functions.

    A reward function has TRL's signature, `fn(prompts, completions, completion_ids=None, **columns) ->
    list[float | None]`, one number per completion; `None` says that it does not apply to that row. It is
    called with keywords: `prompts`, `completions`, `completion_ids` and the dataset's columns but `prompt`,
    only those it names unless it takes `**kwargs`.

    Args:
        funcs: a function, or its import string ("my_file.my_function"; the current directory is searched
            first, as `python -m` does, and stays on `sys.path`), or several of them. A string that is a folder or
            has a "/" is a reward model's path or Hub name, see `RewardModel`; so is the model itself.
        weights: one per function; all 1 if not given.

    Attributes:
        names: one unique name per function, for logging: a repeated one gets `_2`, `_3`, ...

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
        funcs: RewardFunction | str | Sequence[RewardFunction | str],
        weights: Sequence[float] | None = None,
    ) -> None:
        if not (callable(funcs) or isinstance(funcs, Sequence)):
            raise InputError(f"reward functions: give callables or import strings, got {funcs!r}")
        given = [funcs] if callable(funcs) or isinstance(funcs, str) else list(funcs)
        if not given:
            raise InputError("reward functions: at least one is needed, got none")
        self.funcs = [_resolve(fn) for fn in given]
        self.names = _unique([_name(fn) for fn in self.funcs])
        self.weights = _check_weights(weights, self.names)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
    ) -> tuple[Tensor, Tensor]:
        """Score N completions.

        Returns:
            The weighted sum `[N]` over the functions that apply, NaN where none does, and each function's
            rewards `[N, F]`, NaN where it does not apply; both float32.

        Raises:
            InputError: a function raised, needs a column that is not there, or returned something other
                than N finite numbers or `None`s.
        """
        offered: dict[str, Any] = {name: values for name, values in columns.items() if name != "prompt"}
        offered |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        rewards = [
            _checked(_call(fn, name, offered), len(completions), name)
            for fn, name in zip(self.funcs, self.names, strict=True)
        ]
        parts = torch.tensor(rewards, dtype=torch.float32).T.contiguous()
        absent = parts.isnan()
        total = torch.where(absent, 0.0, parts) @ torch.tensor(self.weights, dtype=torch.float32)
        return torch.where(absent.all(1), torch.nan, total), parts

    def to(self, device: torch.device | str) -> RewardFunctions:
        """Move the reward models to `device`."""
        for fn in self.funcs:
            if hasattr(fn, "to"):
                fn.to(device)
        return self

    def accuracy(self, parts: Tensor) -> Tensor | None:
        """Return the first verifier's column `[N]` of `parts` `[N, F]`, or `None` if no function is one."""
        for column, fn in enumerate(self.funcs):
            if getattr(_unwrapped(fn), "verifies", False):
                return parts[:, column]
        return None


def reward_functions(
    funcs: RewardFunctions | Sequence[RewardFunction | str] | RewardFunction | str | None,
    weights: Sequence[float] | None = None,
) -> RewardFunctions | None:
    """Whatever describes rewards, as `RewardFunctions`; `None` where nothing is given.

    Raises:
        InputError: see `RewardFunctions`; also for weights without functions, or beside those that have their own.
    """
    if weights is not None and funcs is None:
        raise InputError("reward weights: there are no reward functions to weight; give those too")
    if weights is not None and isinstance(funcs, RewardFunctions):
        raise InputError("reward weights belong to funcs: give them to RewardFunctions(funcs, weights)")
    if funcs is None or isinstance(funcs, RewardFunctions):
        return funcs
    return RewardFunctions(funcs, weights)


def _resolve(fn: RewardFunction | str) -> RewardFunction:
    if isinstance(fn, nn.Module) or (isinstance(fn, str) and _is_model(fn)):
        from lit_rlhf.rewards.models import RewardModel  # Transformers is heavy

        return RewardModel(fn)
    if isinstance(fn, str):
        return _imported(fn)
    if not callable(fn):
        raise InputError(f"a reward function must be a callable or an import string, got {fn!r}")
    return fn


def _is_model(name: str) -> bool:
    return "/" in name or Path(name).is_dir()


def _imported(path: str) -> RewardFunction:
    module_name, _, name = path.rpartition(".")
    if not module_name or not name or path.startswith("."):
        raise InputError(f"reward function {path!r} is no import string: write 'my_file.my_function'")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"reward function {path!r}: {module_name} cannot be imported, {error}") from error
        nearest = _nearest(module_name, [file.stem for file in Path.cwd().glob("*.py")])
        raise InputError(
            f"reward function {path!r}: there is no module {module_name!r}, neither installed nor "
            f"in {Path.cwd()}{nearest}"
        ) from None
    except Exception as error:
        raise InputError(
            f"reward function {path!r}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    fn = getattr(module, name, None)
    if not callable(fn):
        found = "" if fn is None else f", only a value of type {type(fn).__name__}"
        nearest = _nearest(name, [n for n, value in vars(module).items() if callable(value) and n[0] != "_"])
        raise InputError(f"reward function {path!r}: module {module_name!r} has no function {name!r}{found}{nearest}")
    return fn  # type: ignore[no-any-return]


def _nearest(name: str, candidates: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)
    return f"; the nearest is {matches[0]!r}" if matches else ""


def _unwrapped(fn: RewardFunction) -> RewardFunction:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def _name(fn: RewardFunction) -> str:
    fn = _unwrapped(fn)
    return getattr(fn, "__name__", type(fn).__name__).strip("<>")


def _unique(names: Sequence[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in unique:
            count += 1
            candidate = f"{name}_{count}"
        unique.append(candidate)
    return unique


def _check_weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise InputError(f"reward weights: {len(names)} needed, one for each of {', '.join(names)}, got {len(weights)}")
    for weight, name in zip(weights, names, strict=True):
        if not isinstance(weight, int | float) or not abs(weight) <= _LARGEST:
            raise InputError(f"reward weights: the weight of {name} must be a finite number, got {weight!r}")
    return [float(weight) for weight in weights]


def _call(fn: RewardFunction, name: str, offered: dict[str, Any]) -> Any:
    keywords = {key: list(values) for key, values in _wanted(fn, name, offered).items()}  # copies: it may change them
    try:
        return fn(**keywords)
    except InputError:  # says it itself
        raise
    except Exception as error:
        raise InputError(f"reward function {name} raised {type(error).__name__}: {error}") from error


def _wanted(fn: RewardFunction, name: str, offered: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:  # compiled functions may hide their signature
        return offered
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        wanted = offered
    else:
        wanted = {p.name: offered[p.name] for p in parameters if p.name in offered}
    for p in parameters:
        needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if needed and p.name not in offered:
            has = ", ".join(sorted(offered))
            raise InputError(f"reward function {name} needs {p.name!r}, which the data does not have; it has {has}")
    return wanted


def _checked(returned: Any, count: int, name: str) -> list[float]:
    """Turn what a reward function returned into `count` floats, NaN for `None`."""
    expected = f"expected a list of {count} numbers or None"
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # or Python warns that it was never awaited
        raise InputError(f"reward function {name} returned a coroutine, which is not read yet; {expected}")
    if getattr(returned, "ndim", None) == 1 and hasattr(returned, "tolist"):  # a tensor or an array
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        shape = f" of shape {tuple(returned.shape)}" if hasattr(returned, "shape") else ""
        raise InputError(f"reward function {name} returned a {type(returned).__name__}{shape}; {expected}")
    if len(returned) != count:
        raise InputError(f"reward function {name} returned {len(returned)} rewards; {expected}")
    return [_number(value, row, name) for row, value in enumerate(returned)]


def _number(value: Any, row: int, name: str) -> float:
    if value is None:
        return float("nan")
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of torch or numpy
        value = value.item()
    if not isinstance(value, int | float):
        raise InputError(
            f"reward function {name} returned {value!r} ({type(value).__name__}) for row {row}; "
            f"expected a number, or None where it does not apply"
        )
    if not abs(value) <= _LARGEST:  # NaN fails every comparison
        raise InputError(
            f"reward function {name} returned {value} for row {row}; "
            f"expected a finite number, or None where it does not apply"
        )
    return float(value)

"""What describes a reward function: a callable, an import string, a model, or a node with a `_target_`."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lit_rlhf.errors import InputError

RewardFunction = Callable[..., Any]
_FILE = re.compile(r"(?P<file>.+)\.py(?:$|[:./]+(?P<name>\w*)$)")  # what people write for a function of a file
SCORED = ("prompts", "completions", "completion_ids")


def resolve(fn: RewardFunction | str | Mapping[str, Any] | nn.Module) -> RewardFunction:
    """The reward function that `fn` describes, see `RewardFunctions`.

    Raises:
        InputError: there is none.
    """
    if isinstance(fn, nn.Module) or (isinstance(fn, str) and _is_model(fn)):
        from lit_rlhf.rewards.models import RewardModel  # Transformers is heavy

        return RewardModel(fn)
    if isinstance(fn, Mapping):
        return _of_node(fn)
    found = imported(fn) if isinstance(fn, str) else fn
    if not callable(found):
        raise InputError(f"a reward function must be a callable or an import string, got {fn!r}")
    return _made(found, {}, name_of(found)) if isinstance(found, type) else found


def imported(path: str) -> Any:
    """The callable behind "my_file.my_function".

    Raises:
        InputError: there is none; the nearest that there is, is named.
    """
    if file := _FILE.match(path):
        module_name = ".".join(part for part in Path(file["file"]).parts if part not in (".", "..", "/"))
        raise InputError(
            f"reward function {path!r} is a file and no import string: write "
            f"'{module_name}.{file['name'] or 'my_function'}', without .py"
        )
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
    return fn


def unwrapped(fn: RewardFunction) -> RewardFunction:
    """The function inside of partial ones."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def name_of(fn: RewardFunction) -> str:
    """What a function's rewards are logged as."""
    fn = unwrapped(fn)
    return str(getattr(fn, "__name__", type(fn).__name__)).strip("<>_")


def unique(names: Sequence[str]) -> list[str]:
    """The names, a repeated one with `_2`, `_3`, ... behind it."""
    found: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in found:
            count += 1
            candidate = f"{name}_{count}"
        found.append(candidate)
    return found


def _is_model(name: str) -> bool:
    return ("/" in name and not _FILE.match(name)) or Path(name).is_dir()


def _of_node(node: Mapping[str, Any]) -> RewardFunction:
    """A reward function with the node's arguments fixed, or what a class or a maker of functions makes of them."""
    given = {str(key): value for key, value in node.items() if key != "_target_"}
    target = node.get("_target_")
    if not isinstance(target, str):
        raise InputError(f"a reward function's node needs a _target_, an import path; got {dict(node)!r}")
    fn = imported(target)
    return functools.partial(fn, **given) if _is_reward_function(fn) else _made(fn, given, target)


def _is_reward_function(fn: Any) -> bool:
    if isinstance(fn, type):
        return False
    try:
        return any(name in SCORED for name in inspect.signature(fn).parameters)
    except ValueError:
        return False


def _made(maker: Any, given: Mapping[str, Any], name: str) -> RewardFunction:
    try:
        fn = maker(**given)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"reward function {name}: making it raised {type(error).__name__}: {error}; give its arguments beside its "
            f"_target_, or the object itself in Python"
        ) from error
    if not callable(fn):
        raise InputError(f"reward function {name} made a {type(fn).__name__}; expected something that can be called")
    return fn  # type: ignore[no-any-return]


def _nearest(name: str, candidates: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)
    return f"; the nearest is {matches[0]!r}" if matches else ""

"""Registering and looking up estimators and losses by name, and calling them with the keywords they want."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from lit_rlhf.errors import InputError

AdvantageEstimator: TypeAlias = Callable[..., tuple[Tensor, "Tensor | None"]]
PolicyLoss: TypeAlias = Callable[..., tuple[Tensor, dict[str, Any]]]
_Fn = TypeVar("_Fn", bound=Callable[..., Any])

_ADV_ESTIMATORS: dict[str, AdvantageEstimator] = {}
_POLICY_LOSSES: dict[str, PolicyLoss] = {}
_WITHOUT_RATIO: list[PolicyLoss] = []


def register_adv_estimator(name: str) -> Callable[[_Fn], _Fn]:
    """Decorator: make `fn(rewards, mask, **kw) -> (advantages, returns)` known as `name`.

    Raises:
        InputError: when the name is taken.

    >>> @register_adv_estimator("centred")
    ... def centred(rewards, mask, **kwargs):
    ...     return rewards - rewards.mean(), rewards
    >>> get_adv_estimator("centred") is centred
    True
    """
    return _register(_ADV_ESTIMATORS, "advantage estimator", name)


def register_policy_loss(name: str, *, ratio: bool = True) -> Callable[[_Fn], _Fn]:
    """Decorator: make `fn(old_logp, logp, advantages, mask, **kw) -> (loss, metrics)` known as `name`.

    Args:
        name: what `policy_loss=` will call it.
        ratio: whether the loss weighs by π/π_old itself; without, as in −A·log π, importance correction has to
            start from π (see `rollouts.importance`).

    Raises:
        InputError: when the name is taken.

    >>> @register_policy_loss("plain_ratio")
    ... def plain_ratio(old_logp, logp, advantages, mask, **kwargs):
    ...     return -torch.exp(logp - old_logp) * advantages, {}
    >>> get_policy_loss("plain_ratio") is plain_ratio
    True
    """
    register = _register(_POLICY_LOSSES, "policy loss", name)

    def decorate(fn: Any) -> Any:
        if not ratio:
            _WITHOUT_RATIO.append(fn)
        return register(fn)

    return decorate


def has_ratio(loss: PolicyLoss) -> bool:
    """Whether a policy loss weighs by π/π_old itself; unless it was registered as one without, it does."""
    return (loss.func if isinstance(loss, partial) else loss) not in _WITHOUT_RATIO


def get_adv_estimator(name_or_callable: str | AdvantageEstimator) -> AdvantageEstimator:
    """Look an estimator up by its registered name or its import path; a callable is returned as it is.

    Raises:
        InputError: when no estimator has that name; it says which is nearest.
    """
    return _look_up(_ADV_ESTIMATORS, "advantage estimator", name_or_callable)


def get_policy_loss(name_or_callable: str | PolicyLoss) -> PolicyLoss:
    """Look a policy loss up by its registered name or its import path; a callable is returned as it is.

    Raises:
        InputError: when no loss has that name; it says which is nearest.
    """
    return _look_up(_POLICY_LOSSES, "policy loss", name_or_callable)


def call_with_named(fn: Callable[..., Any], *args: Any, **available: Any) -> Any:
    """Call `fn` with the positional arguments and those of the available keywords that its signature names.

    A function that takes `**kw` gets all of them. What a `functools.partial` has fixed stays as it is.

    Raises:
        InputError: when a keyword that `fn` requires is not available, or is None.

    >>> call_with_named(lambda x, gamma: x * gamma, 2.0, gamma=0.5, beta=0.1)
    1.0
    """
    signature = inspect.signature(fn)
    available = {k: v for k, v in available.items() if not (isinstance(fn, partial) and k in fn.keywords)}
    bound = signature.bind_partial(*args).arguments
    named = {k: p for k, p in signature.parameters.items() if k not in bound and p.kind not in _NOT_NAMED}
    for name, parameter in named.items():
        if parameter.default is parameter.empty and available.get(name) is None:
            title = getattr(fn, "__name__", type(fn).__name__)
            there = [k for k, v in available.items() if v is not None]
            raise InputError(f"{title} needs {name!r}, which is not there; available: {_listed(there)}")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    return fn(*args, **{k: v for k, v in available.items() if k in named or (takes_all and k not in bound)})


_NOT_NAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
)


def _register(table: dict[str, Any], what: str, name: str) -> Callable[[_Fn], _Fn]:
    def decorate(fn: _Fn) -> _Fn:
        if name in table:
            raise InputError(f"{what} {name!r} is already registered, by {table[name].__module__}: choose another name")
        table[name] = fn
        return fn

    return decorate


def _look_up(table: dict[str, _Fn], what: str, name: str | _Fn) -> _Fn:
    if not isinstance(name, str):
        return _usable(what, name)
    if name in table:
        return table[name]
    if "." in name:
        imported: _Fn = import_path(what, name)
        return _usable(what, imported)
    near = difflib.get_close_matches(name, table, 1, 0.0)
    raise InputError(f"unknown {what} {name!r}: did you mean {near[0]!r}? registered: {_listed(table)}")


def _usable(what: str, fn: _Fn) -> _Fn:
    if isinstance(fn, type):
        title, key = f"{fn.__module__}.{fn.__qualname__}", what.replace(" ", "_")
        raise InputError(f"{what}: {title} is a class; give an object of it, on the command line algo.{key}._target_=")
    if not callable(fn):
        raise InputError(f"{what}: {fn!r} is no function; give a registered name, an import path or a function")
    return fn


def import_path(what: str, path: str) -> Any:
    """What a dotted import path names.

    Raises:
        InputError: there is no such module, or it has no such name; it says which is nearest.
    """
    module, _, name = path.rpartition(".")
    try:
        found = import_module(module)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{what}: cannot import {path!r} ({error}); give a registered name or an import path"
        ) from None
    if not hasattr(found, name):
        public = [known for known in dir(found) if not known.startswith("_")]
        near = difflib.get_close_matches(name, public, 1, 0.0)
        hint = f": did you mean {module}.{near[0]}?" if near else ", and no other public name"
        raise InputError(f"{what}: module {module!r} has no {name!r}{hint}")
    return getattr(found, name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"

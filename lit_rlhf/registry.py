"""Advantage estimators and policy losses by name, so that a config composes any of one with any of the other.

An estimator is `fn(rewards, mask, **kw) -> (advantages, returns)`, with rewards `[N]` or `[N, T]` and mask
`[N, T]`. A loss is `fn(old_logp, logp, advantages, mask, **kw) -> (loss, metrics)`, with the loss per token
`[N, T]` or a scalar. Each names the keywords it wants, and gets those (see `call_with_named`).

The built-in estimators return both tensors `[N, T]`, 0 outside the mask; the built-in losses return `[N, T]` and
detached `[N, T]` metrics, which the caller averages over the mask.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from lit_rlhf import functional as F  # noqa: N812
from lit_rlhf.errors import InputError
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.functional.policy_losses import policy_ratio, product_ratio, sequence_ratio
from lit_rlhf.functional.shaping import terminal_rewards
from lit_rlhf.ranks import mean_over_ranks, moments_over_ranks

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


def _row_scores(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards `[N]`, or the sum over the valid tokens of `[N, T]`."""
    return rewards if rewards.ndim == 1 else zero_outside(rewards, mask).sum(1)


def _token_rewards(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards `[N, T]`, a `[N]` score on the last valid token alone, and which rows `[N, 1]` hold no NaN.

    A row that could not be scored must not make its neighbours NaN: its rewards count as 0 and it is left out after.
    """
    per_token = terminal_rewards(rewards, mask) if rewards.ndim == 1 else zero_outside(rewards, mask)
    return _without_nan(per_token), ~per_token.isnan().any(1, keepdim=True)


def _without_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), 0.0, x)


def _spread(per_row: Tensor, mask: Tensor) -> Tensor:
    return zero_outside(per_row.unsqueeze(1).expand(mask.shape), mask)


def _from_groups(scores: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and scores on every valid token; with γ = 1 the score is the return of each."""
    return _spread(advantages, mask), _spread(_without_nan(scores), mask)


@register_adv_estimator("group_normalize")
def _group_normalize(
    rewards: Tensor, mask: Tensor, group_ids: Tensor, scale_rewards: str = "std"
) -> tuple[Tensor, Tensor]:
    """GRPO: `functional.group_normalize` of the row scores, on every valid token."""
    scores = _row_scores(rewards, mask)
    if scale_rewards != "batch":
        return _from_groups(scores, F.group_normalize(scores, group_ids, scale_rewards), mask)
    var = moments_over_ranks(scores, ~scores.isnan())[1].to(scores.dtype)  # of all ranks, which a group never spans
    return _from_groups(scores, F.group_normalize(scores, group_ids, "none") / (var.sqrt() + 1e-4), mask)


@register_adv_estimator("rloo")
def _rloo(rewards: Tensor, mask: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """RLOO: `functional.leave_one_out` of the row scores, on every valid token."""
    scores = _row_scores(rewards, mask)
    return _from_groups(scores, F.leave_one_out(scores, group_ids), mask)


@register_adv_estimator("batch_mean")
def _batch_mean(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The row scores minus their mean over all ranks, on every valid token; 0 for a row with a NaN reward."""
    scores = _row_scores(rewards, mask)
    mean = mean_over_ranks(scores, ~scores.isnan()).to(scores.dtype)
    return _from_groups(scores, _without_nan(scores - mean), mask)


@register_adv_estimator("gae")
def _gae(
    rewards: Tensor,
    mask: Tensor,
    values: Tensor,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO: `functional.generalized_advantage_estimation`; a row with a NaN reward gets A = 0 and returns = values."""
    per_token, scored = _token_rewards(rewards, mask)
    advantages, returns = F.generalized_advantage_estimation(per_token, values, mask, gamma, gae_lambda, bootstrap)
    return torch.where(scored, advantages, 0.0), torch.where(scored, returns, zero_outside(values, mask))


@register_adv_estimator("rewards_to_go")
def _rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """REINFORCE: `functional.rewards_to_go`, as advantages and as returns; 0 for a row with a NaN reward."""
    per_token, scored = _token_rewards(rewards, mask)
    returns = torch.where(scored, F.rewards_to_go(per_token, mask, gamma), 0.0)
    return returns, returns


@register_policy_loss("clip")
def _clip(
    old_logp: Tensor,
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO, GRPO, DAPO: `functional.clipped_policy_loss`."""
    old, new, adv = (zero_outside(x, mask) for x in (old_logp, logp, advantages))
    loss = F.clipped_policy_loss(new, old, adv, clip_ratio_low, clip_ratio_high, dual_clip)
    return loss, F.clip_statistics(policy_ratio(new, old), adv, clip_ratio_low, clip_ratio_high)


def _clipped_by_sequence(fn: Callable[..., Tensor], ratio_of: Callable[..., Tensor], *args: Any) -> Any:
    """A loss that clips a ratio of the sequence, and the clip statistics of that ratio."""
    old_logp, logp, advantages, mask, low, high = args
    stats = F.clip_statistics(
        zero_outside(ratio_of(logp, old_logp, mask), mask), zero_outside(advantages, mask), low, high
    )
    loss = fn(logp, old_logp, advantages, mask, low, high)
    return loss, {name: zero_outside(value, mask) for name, value in stats.items()}


@register_policy_loss("gspo")
def _gspo(
    old_logp: Tensor,
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio_low: float = 3e-4,
    clip_ratio_high: float = 4e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO: `functional.gspo_policy_loss`; the clip statistics are those of the sequence ratio."""
    args = (old_logp, logp, advantages, mask, clip_ratio_low, clip_ratio_high)
    found: tuple[Tensor, dict[str, Tensor]] = _clipped_by_sequence(F.gspo_policy_loss, sequence_ratio, *args)
    return found


@register_policy_loss("gspo_token")
def _gspo_token(
    old_logp: Tensor,
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio_low: float = 3e-4,
    clip_ratio_high: float = 4e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO-token: `functional.gspo_token_policy_loss`."""
    args = (old_logp, logp, advantages, mask, clip_ratio_low, clip_ratio_high)
    found: tuple[Tensor, dict[str, Tensor]] = _clipped_by_sequence(F.gspo_token_policy_loss, sequence_ratio, *args)
    return found


@register_policy_loss("sequence_clip")
def _sequence_clip(
    old_logp: Tensor,
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """RLOO over several steps: `functional.sequence_clipped_policy_loss`."""
    args = (old_logp, logp, advantages, mask, clip_ratio_low, clip_ratio_high)
    found: tuple[Tensor, dict[str, Tensor]] = _clipped_by_sequence(F.sequence_clipped_policy_loss, product_ratio, *args)
    return found


@register_policy_loss("cispo")
def _cispo(
    old_logp: Tensor,
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_min: float = 0.0,
    clip_max: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO: `functional.cispo_policy_loss`; the clip statistics are of its absolute bounds."""
    old, new, adv = (zero_outside(x, mask) for x in (old_logp, logp, advantages))
    loss = F.cispo_policy_loss(new, old, adv, clip_min, clip_max)
    return loss, F.clip_statistics(policy_ratio(new, old), adv, 1 - clip_min, clip_max - 1)


@register_policy_loss("reinforce", ratio=False)
def _reinforce(old_logp: Tensor, logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE, RLOO, ReMax: the score function, −A·log π."""
    return -zero_outside(advantages, mask).detach() * zero_outside(logp, mask), {}

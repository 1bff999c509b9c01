"""Call reward functions: with the keywords they name, within a time, and with a check of what they return."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Collection, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from functools import cache
from typing import Any

import torch

from lit_rlhf.errors import InputError
from lit_rlhf.rewards.resolving import RewardFunction
from lit_rlhf.rewards.timeouts import TimedOut, within

TOLD = ("trainer_state", "log_extra", "log_metric")  # what functions may name beside what is scored and the columns
LARGEST = torch.finfo(torch.float32).max
_BLOCKED = 1.0  # seconds beyond the limit after which functions that await nothing count as hanging


def call(fn: RewardFunction, name: str, offered: Mapping[str, Any], timeout: float | None) -> Any:
    """What `fn` returns, called with those of the keywords offered that it names; an awaitable is not awaited.

    Raises:
        InputError: it needs others, raises, or does not return in time.
    """
    keywords = {key: _copied(offered[key]) for key in wanted(fn, name, offered)}
    try:
        return within(timeout, lambda: fn(**keywords))
    except TimedOut:
        raise InputError(_hangs(name, timeout)) from None
    except InputError:  # says it itself
        raise
    except Exception as error:
        raise InputError(_raised(name, error)) from error


def answer(prompt: Any, text: str) -> Any:
    """A completion as functions are handed it: of a prompt of chat messages one, too."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def wanted(fn: RewardFunction, name: str, offered: Collection[str]) -> list[str]:
    """Those of the keywords offered that a function is called with.

    Raises:
        InputError: it needs one that is not offered.
    """
    fixed = fn.keywords if isinstance(fn, functools.partial) else {}
    try:
        parameters = [p for p in inspect.signature(fn).parameters.values() if p.name not in fixed]
    except ValueError:  # compiled functions may hide their signature
        return list(offered)
    for p in parameters:
        needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if needed and p.name not in offered:
            has = ", ".join(sorted(set(offered) - set(TOLD)))
            raise InputError(f"reward function {name} needs {p.name!r}, which the data does not have; it has {has}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return [key for key in offered if key not in fixed]
    return [p.name for p in parameters if p.name in offered]


def awaited(awaitables: Mapping[str, Awaitable[Any]], timeout: float | None) -> dict[str, Any]:
    """What asynchronous functions return, by their names; all of them run at the same time.

    They run in an event loop of this process's own, in a thread beside: it lives on from call to call, as clients that
    keep connections need it, and whoever calls may be inside of a running loop, as a notebook is.

    Raises:
        InputError: one raises or does not return in time. The others are cancelled.
    """
    if not awaitables:
        return {}

    async def run() -> tuple[dict[str, asyncio.Task[Any]], list[str]]:
        tasks = {name: asyncio.create_task(_coroutine(a)) for name, a in awaitables.items()}
        _, late = await asyncio.wait(tasks.values(), timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        for task in late:
            task.cancel()
        done = {name: task for name, task in tasks.items() if task not in late}
        return done, [name for name in tasks if name not in done]

    future = asyncio.run_coroutine_threadsafe(run(), _event_loop(os.getpid()))
    try:
        done, late = future.result(timeout + _BLOCKED if timeout else None)
    except FutureTimeout:
        _event_loop.cache_clear()  # that one is blocked
        names = " or ".join(awaitables)
        raise InputError(f"{_hangs(names, timeout)}; it blocks its event loop instead of awaiting") from None
    finally:
        future.cancel()
    found = {name: _result(name, task) for name, task in done.items()}
    if late:
        raise InputError(_hangs(late[0], timeout))
    return found


def _result(name: str, task: asyncio.Task[Any]) -> Any:
    try:
        return task.result()
    except InputError:
        raise
    except (Exception, asyncio.CancelledError) as error:
        raise InputError(_raised(name, error)) from error


def numbers(returned: Any, count: int, name: str) -> list[float]:
    """What a reward function returned as `count` floats, NaN for `None`.

    Raises:
        InputError: it returned something else.
    """
    expected = f"expected a list of {count} numbers or None"
    if getattr(returned, "ndim", None) == 1 and hasattr(returned, "tolist"):  # a tensor or an array
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        shape = f" of shape {tuple(returned.shape)}" if hasattr(returned, "shape") else ""
        hint = f"; {name} makes reward functions, so give what it returns" if callable(returned) else ""
        raise InputError(f"reward function {name} returned a {type(returned).__name__}{shape}; {expected}{hint}")
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
    if not abs(value) <= LARGEST:  # NaN fails every comparison
        raise InputError(
            f"reward function {name} returned {value} for row {row}; "
            f"expected a finite number, or None where it does not apply"
        )
    return float(value)


def _copied(value: Any) -> Any:
    """A copy of nested lists and dictionaries: a function may change what it is given, and the data stays as it is."""
    if type(value) is list:
        return [_copied(x) for x in value] if any(type(x) in (list, dict) for x in value) else list(value)
    return {key: _copied(x) for key, x in value.items()} if type(value) is dict else value


def _raised(name: str, error: BaseException) -> str:
    return f"reward function {name} raised {type(error).__name__}: {error}".removesuffix(": ")


def _hangs(name: str, timeout: float | None) -> str:
    return (
        f"reward function {name} has not returned after {timeout:g} seconds; if it needs longer raise reward.timeout "
        "(in Python RewardFunctions(..., timeout=...)), null is no limit"
    )


async def _coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    """A running event loop; a forked process has one of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop

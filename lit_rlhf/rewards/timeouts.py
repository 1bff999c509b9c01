"""A limit on the time that a call may take, wherever it hangs in Python."""

from __future__ import annotations

import contextvars
import ctypes
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_AGAIN = 1.0  # seconds until the alarm rings again, for a first one that a finaliser or a bare `except` swallowed


class TimedOut(BaseException):
    """The time is up. No `Exception`, so that `except Exception` in what is called does not swallow it."""


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """`call()`, or `TimedOut` where it takes longer than `seconds`; None or 0 is no limit.

    In the main thread an alarm interrupts it (SIGALRM): sleeps, loops and regular expressions end. A handler and a
    timer that were set before are put back; a call that sets an alarm of its own replaces this one. In other threads,
    and where there is no SIGALRM, the call runs in a thread of its own and is left to itself; there a single call into
    C that keeps the interpreter's lock, such as a regular expression, cannot be interrupted.
    """
    if not seconds:
        return call()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _with_alarm(seconds, call)
    return _in_thread(seconds, call)


def _with_alarm(seconds: float, call: Callable[[], T]) -> T:
    armed = True

    def ring(*_: Any) -> None:
        if armed:
            raise TimedOut

    handler, started = signal.signal(signal.SIGALRM, ring), time.monotonic()
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    if 0 < delay < seconds:  # an earlier limit around this one
        signal.setitimer(signal.ITIMER_REAL, delay, _AGAIN)
    try:
        try:
            return call()
        finally:
            armed = False  # from here on nothing interrupts the clearing up
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - started), 1e-6), interval)


def _in_thread(seconds: float, call: Callable[[], T]) -> T:
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(context.run(call))
        except BaseException as error:
            raised.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        # ends a loop in Python, and does nothing to what waits in C
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimedOut))
        raise TimedOut
    if raised:
        raise raised[0]
    return returned[0]

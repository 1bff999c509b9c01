"""Where the time of a step goes: named sections that may call one another, each with the time spent in itself alone."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Times sections. What a section calls that is a section of its own counts as that one's.

    Args:
        rest: the name of what belongs to no section.
    """

    def __init__(self, rest: str) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._sections = [rest]
        self._since = time.perf_counter()

    def start(self) -> None:
        """Forget what was timed so far."""
        self.seconds.clear()
        self._since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds by section since `start`."""
        self._count()
        return dict(self.seconds)

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self._sections[-1]] += now - self._since
        self._since = now

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What runs inside belongs to `name`."""
        self._count()
        self._sections.append(name)
        try:
            yield
        finally:
            self._count()
            self._sections.pop()

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Time a function or method where it is looked up: `attribute` of a module, a class or an object."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.section(name):
                return function(*arguments, **named)

        setattr(owner, attribute, timed)

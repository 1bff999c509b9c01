"""What the stability monitor remembers of a metric."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import median, stdev
from typing import Any

FIRST, RECENT = 5, 10  # rollouts that a run is measured by: those that it begins with, and the newest


@dataclass
class Track:
    """One metric over the run, as far as gates look at it."""

    first: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    best: float = -float("inf")  # highest median of `recent`
    lowest: float = float("inf")  # of all values
    highest: float = -float("inf")
    count: int = 0  # rollouts so far

    def add(self, value: float) -> None:
        """Take the value of another rollout."""
        self.count += 1
        if len(self.first) < FIRST:
            self.first.append(value)
        self.recent.append(value)
        self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)
        if len(self.recent) == RECENT:
            self.best = max(self.best, self.now)

    def at(self, i: int) -> Track:
        """The same as if `recent[i]` were all that is recent."""
        return replace(self, recent=deque([self.recent[i]]))

    @property
    def now(self) -> float:
        """Median of the newest values: one rollout does not make a finding."""
        return median(self.recent)

    @property
    def start(self) -> float:
        """Median of the first values."""
        return median(self.first)

    @property
    def noise(self) -> float:
        """Standard deviation of the first values."""
        return stdev(self.first) if len(self.first) > 1 else 0.0

    @property
    def spread(self) -> float:
        """Standard deviation of the newest values."""
        return stdev(self.recent) if len(self.recent) > 1 else 0.0

    @property
    def full(self) -> bool:
        """Whether there is enough to judge by."""
        return len(self.recent) == RECENT


Tracks = Mapping[str, Track]


def plain(tracks: Tracks) -> dict[str, Any]:
    """For a checkpoint."""
    return {name: {**asdict(track), "recent": list(track.recent)} for name, track in tracks.items()}


def tracks_from(saved: Mapping[str, Any]) -> dict[str, Track]:
    """The inverse of `plain`."""
    return {name: Track(**{**old, "recent": deque(old["recent"], maxlen=RECENT)}) for name, old in saved.items()}

"""The figure of a comparison: the curves of each group of runs, with the spread over its seeds as a band."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lit_rlhf.monitoring.charts import Line
from lit_rlhf.monitoring.comparison import Group
from lit_rlhf.monitoring.measures import MEASURES

_COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#777777", "#222255")  # Tol's bright ones
_DASHES = ("-", "--", ":", "-.")  # where there are more groups than colours
_EVERY_ROLLOUT = {"reward/reward_mean": "reward of the samples", "stability/approx_kl": "KL of an update, nats"}
_SMOOTHED = 20  # points that a curve of every rollout is averaged to


def draw(groups: Sequence[Group], target: Path) -> bool:
    """A panel for each measure that a group is judged by, one for the reward and one for the KL of an update.

    Returns:
        Whether there was anything to draw.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    judged = dict.fromkeys(group.measure for group in groups if group.measure)
    panels = {name: f"{MEASURES[name]}, held out" for name in judged}
    panels |= {name: title for name, title in _EVERY_ROLLOUT.items() if any(_lines(g, name) for g in groups)}
    if not panels:
        return False
    size = (3.4 * len(panels), 3.2 + 0.2 * (-(-len(groups) // 4)))
    figure, axes = plt.subplots(1, len(panels), figsize=size, dpi=130, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
        for number, group in enumerate(groups):
            if name in _EVERY_ROLLOUT or group.measure == name:
                _curve(axis, group, name, number, handles)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimiser steps", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    below: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    figure.legend(handles.values(), handles.keys(), ncols=min(4, len(handles)), **below)
    figure.savefig(target)
    plt.close(figure)
    return True


def _lines(group: Group, metric: str) -> list[Line]:
    found = [run.read.line(metric, by="step") for run in group.whole if run.read]
    return [line for line in found if line is not None]


def _curve(axis: Any, group: Group, metric: str, number: int, handles: dict[str, Any]) -> None:
    """The mean over the runs, the band from the least to the greatest."""
    lines = [_smoothed(line) if metric in _EVERY_ROLLOUT else line for line in _lines(group, metric)]
    if not lines:
        return
    at: dict[float, list[float]] = {}
    for line in lines:
        for x, y in zip(line.x, line.y, strict=True):
            at.setdefault(x, []).append(y)
    xs = sorted(at)
    style = {"color": _COLORS[number % len(_COLORS)], "ls": _DASHES[number // len(_COLORS) % len(_DASHES)]}
    marker = {"marker": "o", "ms": 3} if metric not in _EVERY_ROLLOUT else {}
    (handles[group.name],) = axis.plot(xs, [mean(at[x]) for x in xs], lw=1.6, **style, **marker)
    axis.fill_between(xs, [min(at[x]) for x in xs], [max(at[x]) for x in xs], color=style["color"], alpha=0.18, lw=0)


def _smoothed(line: Line) -> Line:
    """At most `_SMOOTHED` points, each the mean of as many neighbours."""
    size = -(-len(line.x) // _SMOOTHED)
    chunks = [slice(start, start + size) for start in range(0, len(line.x), size)]
    return Line(line.name, [mean(line.x[c]) for c in chunks], [mean(line.y[c]) for c in chunks])

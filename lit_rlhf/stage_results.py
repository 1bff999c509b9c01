"""What the stages of a pipeline brought on held-out data: read from their metrics, as a table and as a figure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lit_rlhf.monitoring.measures import MEASURES, PERPLEXITY, REWARD, aligned
from lit_rlhf.stages import Stage

Curve: TypeAlias = list[tuple[int, float]]  # optimiser step, value

_COLORS = ("#4477AA", "#66CCEE", "#228833")
_RIGHT_COLOR = "#CC6677"


def curves_of(stage: Stage) -> dict[str, Curve]:
    """The curves of `MEASURES` of a run, by name; of one that was continued, those of its former files too."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(stage.folder.glob("metrics*.csv"), key=_number):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                for name in MEASURES:
                    if row.get(name):
                        found.setdefault(name, {})[int(row["step"])] = float(row[name])
    if found.get(REWARD) == found.get("val/accuracy_sampled"):  # the verifier's own
        found.pop(REWARD, None)
    return {name: sorted(found[name].items()) for name in MEASURES if name in found}


def _number(file: Path) -> float:
    """The place of a metrics file in the run: `metrics.1.csv` is the oldest, `metrics.csv` the newest."""
    _, _, number = file.stem.partition(".")
    return float(number or "inf")


def results_of(stages: Sequence[Stage]) -> dict[str, Any]:
    """Each stage's algorithm, command, seconds, model, and first and last value of every measure."""
    results: dict[str, Any] = {}
    for stage in stages:
        measured = {name: {"before": c[0][1], "after": c[-1][1]} for name, c in curves_of(stage).items()}
        results[stage.name] = {**stage.record, "model": str(stage.model), "held_out": measured}
    return results


def table(results: dict[str, Any]) -> str:
    """The results as lines of text, a line for each measure of each stage."""
    lines = [("stage", "algorithm", "seconds", "on held-out data", "before", "after")]
    for name, result in results.items():
        head = (name, str(result["algorithm"]), f"{result['seconds']:.0f}")
        measured = [
            (MEASURES[measure], f"{values['before']:.3f}", f"{values['after']:.3f}")
            for measure, values in result["held_out"].items()
        ]
        for own in measured or [("-", "-", "-")]:
            lines.append((*head, *own))
            head = ("", "", "")
    return aligned(lines, left=(0, 1, 3))


def draw(stages: Sequence[Stage], target: Path) -> None:
    """A panel per stage: held-out accuracies over the optimiser steps; on the right axis what has no end at 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(stages), figsize=(3.6 * len(stages), 3.2), dpi=150, squeeze=False)
    for number, (axis, stage) in enumerate(zip(axes.flat, stages, strict=True), 1):
        title = stage.name if stage.name == stage.algorithm else f"{stage.name}: {stage.algorithm}"
        axis.set_title(f"{number}. {title}", fontsize=10)
        _panel(axis, curves_of(stage))
    axes.flat[0].set_ylabel("on held-out data")
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def _panel(axis: Any, curves: dict[str, Curve]) -> None:
    """The curves of one stage: those from 0 to 1 on the left axis, the reward or else the perplexity on the right."""
    right_name = next((name for name in (REWARD, PERPLEXITY) if name in curves), None)
    left = [name for name in curves if name not in (REWARD, PERPLEXITY)]
    style = {"marker": "o", "ms": 3}
    lines = []
    for name, color in zip(left, _COLORS, strict=False):
        lines += axis.plot(*zip(*curves[name], strict=True), color=color, label=MEASURES[name], **style)
    if right_name is not None:
        right = axis.twinx()
        label = f"{MEASURES[right_name]} (right axis)"
        points = zip(*curves[right_name], strict=True)
        lines += right.plot(*points, color=_RIGHT_COLOR, ls="--", label=label, **style)
        right.spines["top"].set_visible(False)
        right.tick_params(axis="y", colors=_RIGHT_COLOR)
    axis.set(xlabel="optimiser steps", ylim=(-0.02, 1.02))
    axis.spines["top"].set_visible(False)
    axis.grid(alpha=0.25)
    if lines:
        axis.legend(handles=lines, fontsize=7, frameon=False, loc="lower right")

"""Reads what a run has left in its folder."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_rlhf.errors import InputError
from lit_rlhf.monitoring.charts import Line


@dataclass(frozen=True)
class RunFolder:
    """A run's metrics, samples, findings and configuration, as far as they are there."""

    path: Path
    rows: list[dict[str, float]]  # of metrics.csv, in order; what was not logged is not there
    samples: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)  # versions and machine

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """Read a folder; the parts of a run that was continued in it come one after the other.

        Raises:
            InputError: there is no run.
        """
        folder = Path(path)
        if not (folder / "metrics.csv").is_file():
            raise InputError(f"{folder} is no run's folder: it has no metrics.csv")
        earlier = [
            (int(m[1]), file) for file in folder.iterdir() if (m := re.fullmatch(r"metrics\.(\d+)\.csv", file.name))
        ]
        rows = [row for file in [*(f for _, f in sorted(earlier)), folder / "metrics.csv"] for row in _rows(file)]
        return cls(
            folder,
            rows,
            [json.loads(line) for line in _text(folder / "samples.jsonl").splitlines()],
            json.loads(_text(folder / "findings.json") or "[]"),
            yaml.safe_load(_text(folder / "config" / "config.yaml")) or {},
            yaml.safe_load(_text(folder / "config" / "overrides.yaml")) or [],
            json.loads(_text(folder / "environment.json") or "{}"),
        )

    def line(self, metric: str, name: str | None = None) -> Line | None:
        """The curve of a metric by rollout (or pass), validations at the rollout before them; None without a point."""
        x, y, now = [], [], 0.0
        for row in self.rows:
            now = row.get("rollout/iteration", now)
            if metric in row:
                x.append(now)
                y.append(row[metric])
        return Line(name or metric, x, y) if y else None


def _rows(file: Path) -> Iterator[dict[str, float]]:
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            values = {name: float(value) for name, value in row.items() if name and value}
            yield {name: value for name, value in values.items() if math.isfinite(value)}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""

"""Reads what a run has left in its folder."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
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
    findings: list[dict[str, Any]] | None = None  # without a stability monitor
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
        parts = [*(file for _, file in sorted(earlier)), folder / "metrics.csv"]
        return cls(
            folder,
            _without_repeats([row for file in parts for row in _rows(file)], "rollout/iteration"),
            _without_repeats([*_json_lines(folder / "samples.jsonl")], "rollout", several=True),
            _json(folder / "findings.json", None),
            yaml.safe_load(_text(folder / "config" / "config.yaml")) or {},
            yaml.safe_load(_text(folder / "config" / "overrides.yaml")) or [],
            _json(folder / "environment.json", {}),
        )

    def line(self, metric: str, name: str | None = None, by: str = "rollout/iteration") -> Line | None:
        """The curve of a metric by rollout (or pass), validations at the rollout before them; None without a point.

        Args:
            metric: as it is logged.
            name: of the curve.
            by: what else to count by: `step`, the optimiser steps.
        """
        x, y, now = [], [], 0.0
        for row in self.rows:
            now = row.get(by, now)
            if metric in row:
                x.append(now)
                y.append(row[metric])
        return Line(name or metric, x, y) if y else None


def _rows(file: Path) -> Iterator[dict[str, float]]:
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if None not in row.values():  # a kill has cut it off
                yield {name: number for name, text in row.items() if (number := _number(text)) is not None}


def _number(text: str) -> float | None:
    """A finite number; None of anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _without_repeats(entries: list[dict[str, Any]], key: str, several: bool = False) -> list[dict[str, Any]]:
    """The entries of a run that was continued: where it went back to an earlier `key`, what it then made is dropped.

    Args:
        entries: in the order they were written.
        key: what grows.
        several: whether entries that follow each other may have the same.
    """
    kept: list[dict[str, Any]] = []
    last = -math.inf
    for entry in entries:
        now = entry.get(key)
        if now is not None and (now < last or (now == last and not several)):
            first = next(i for i, one in enumerate(kept) if one.get(key, -math.inf) >= now)
            del kept[first:]
        kept.append(entry)
        last = last if now is None else now
    return kept


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that can be read: a kill may cut one off."""
    for line in _text(file).splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def _json(file: Path, missing: Any) -> Any:
    with suppress(json.JSONDecodeError):
        return json.loads(_text(file))
    return missing


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

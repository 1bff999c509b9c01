"""Reads what a run has left in its folder."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_rlhf.errors import InputError
from lit_rlhf.monitoring.charts import Line
from lit_rlhf.monitoring.healthy import checked_bounds

SECONDS, ENDED = "seconds of training", "training ended"  # in environment.json


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
    bounds: dict[str, Any] = field(default_factory=dict)  # of the stability monitor, where they are not the usual ones

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """Read a folder; the parts of a run that was continued in it come one after the other.

        Raises:
            InputError: there is no run, or a file of it holds something else than a run writes there.
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
            _without_repeats([*_samples(folder / "samples.jsonl")], "rollout", several=True),
            _findings(folder / "findings.json"),
            _yaml(folder / "config" / "config.yaml", dict) or {},
            overrides_in(folder),
            environment_in(folder),
            _bounds(folder / "bounds.json"),
        )

    @property
    def algorithm(self) -> str:
        """The class that was trained; empty where that is not known."""
        algo = self.config.get("algo")
        return str(algo.get("_target_", "")).rpartition(".")[2] if isinstance(algo, dict) else ""

    @property
    def unit(self) -> str:
        """What `rollout/iteration` counts: a rollout, or a pass over data."""
        return "pass" if self.line("reward/reward_mean") is None else "rollout"

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


def overrides_in(folder: Path) -> list[str]:
    """What the command line of the run in this folder gave.

    Raises:
        InputError: its file holds something else.
    """
    return [str(one) for one in _yaml(folder / "config" / "overrides.yaml", list) or []]


def environment_in(folder: Path) -> dict[str, Any]:
    """What `callbacks.report` has noted of the run in this folder: versions, machine, how long it took.

    Raises:
        InputError: its file holds something else.
    """
    file = folder / "environment.json"
    about = _json(file)
    if about is None:
        return {}
    if not isinstance(about, dict):
        raise InputError(f"{file}: is no object of names and values")
    if not _has({SECONDS: 0, **about}, {SECONDS: _NUMBER}):
        raise InputError(f"{file}: {SECONDS!r} must be a number, got {about[SECONDS]!r}")
    return about


def _rows(file: Path) -> Iterator[dict[str, float]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                if None in row:
                    raise InputError(f"{file}: line {reader.line_num} has more cells than the first line has names")
                if None not in row.values():  # a kill has cut it off
                    yield {name: number for name, text in row.items() if (number := _number(text)) is not None}
    except (csv.Error, UnicodeDecodeError):
        raise InputError(f"{file}: is no table of metrics as a run writes it") from None


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


_Kinds = Mapping[str, type | tuple[type, ...]]
_NUMBER = (int, float)
_SAMPLE: _Kinds = {
    **{"rollout": int, "prompt": str, "completion": str},
    **{"reward": (*_NUMBER, type(None)), "tokens": int, "finish": str},
}
_FINDING: _Kinds = {"gate": str, "since": _NUMBER, "says": str, "advice": str}


def _samples(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that can be read: a kill may cut one off."""
    for number, line in enumerate(text_of(file).splitlines(), 1):
        try:
            sample = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not _has(sample, _SAMPLE):
            raise InputError(f"{file}: line {number} is no sample, an object of {', '.join(_SAMPLE)}")
        yield sample


def _findings(file: Path) -> list[dict[str, Any]] | None:
    found = _json(file)
    if found is not None and not (isinstance(found, list) and all(_has(one, _FINDING) for one in found)):
        raise InputError(f"{file}: is no list of findings, objects of {', '.join(_FINDING)}")
    return found


def _bounds(file: Path) -> dict[str, Any]:
    moved = _json(file) or {}
    if not isinstance(moved, dict):
        raise InputError(f"{file}: is no object of bounds")
    try:
        return checked_bounds(moved)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _has(entry: Any, kinds: _Kinds) -> bool:
    """Whether it is an object that has these keys, with values of these kinds."""
    return isinstance(entry, dict) and all(isinstance(entry.get(key, ...), kind) for key, kind in kinds.items())


def _json(file: Path) -> Any:
    """What the file holds; None where there is none, or it is empty."""
    text = text_of(file)
    try:
        return json.loads(text) if text.strip() else None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: is no JSON ({error})") from None


def _yaml(file: Path, kind: type) -> Any:
    try:
        content = yaml.safe_load(text_of(file))
    except yaml.YAMLError as error:
        raise InputError(f"{file}: is no YAML ({' '.join(str(error).split())})") from None
    if content is not None and not isinstance(content, kind):
        raise InputError(f"{file}: holds no {'mapping' if kind is dict else 'list'}")
    return content


def text_of(file: Path) -> str:
    """What the file says; nothing where there is none."""
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

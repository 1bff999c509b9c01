"""Runs side by side: those that differ in nothing but their seed are one group, told by mean and spread."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

from lit_rlhf.errors import InputError
from lit_rlhf.monitoring.charts import short
from lit_rlhf.monitoring.measures import MEASURES, aligned
from lit_rlhf.monitoring.run_folder import ENDED, SECONDS, RunFolder, overrides_in, text_of

FAILED = "failed.txt"  # in the folder of a run: why it has no end
LAST = 10  # rollouts that what varies from one to the next is averaged over
_MEASURES = {"val/accuracy_sampled": 0, "val/preference_accuracy": 1}  # before the others: DPO has both


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    folder: Path
    overrides: dict[str, str]
    failed: str | None  # why
    read: RunFolder | None  # where it has logged anything

    @classmethod
    def of(cls, folder: Path) -> Run:
        """What lies in a folder."""
        pairs = [override.lstrip("+").partition("=") for override in overrides_in(folder)]
        return cls(
            folder,
            {key: value for key, _, value in pairs},
            text_of(folder / FAILED).strip() if (folder / FAILED).is_file() else None,
            RunFolder.read(folder) if (folder / "metrics.csv").is_file() else None,
        )

    @cached_property
    def unfinished(self) -> str | None:
        """How far a run has come that was stopped or killed, or goes on; None of one that has failed or is whole."""
        if self.failed is not None or self.read is None or self.read.about.get(ENDED, True):
            return None
        given = self.read.config.get("trainer")
        limits = given if isinstance(given, dict) else {}
        reached = max((row.get("rollout/iteration", 0) for row in self.read.rows), default=0)
        last = limits.get("max_epochs")
        return f"at {self.read.unit} {reached:.0f}" + (f" of {last}" if isinstance(last, int) and last > 0 else "")

    @property
    def whole(self) -> bool:
        """Whether it has come to its end."""
        return self.failed is None and self.unfinished is None

    @cached_property
    def measure(self) -> str | None:
        """What the run is judged by: the first of `MEASURES` that it has logged, accuracy and pairs before all."""
        ranked = sorted(MEASURES, key=lambda name: _MEASURES.get(name, 2))
        return next((name for name in ranked if self.read and self.read.line(name)), None)

    @cached_property
    def numbers(self) -> dict[str, float]:
        """By the names of the table's columns; what was not measured is not there."""
        if self.read is None:
            return {}
        held_out = self.read.line(self.measure, by="step") if self.measure else None
        found = {}
        if held_out is not None:
            found = {"before": held_out.y[0]} if held_out.x[0] == 0 else {}
            found["after"] = held_out.y[-1]
        for column, metric in LATEST.items():
            if (line := self.read.line(metric)) is not None:
                found[column] = mean(line.y[-LAST:])
        if (seconds := self.read.about.get(SECONDS)) is not None:
            found["seconds"] = float(seconds)
        return found


LATEST = {  # columns of what is logged at every rollout
    "reward": "reward/reward_mean",
    "KL to reference": "stability/kl_divergence",
    "KL of an update": "stability/approx_kl",
}
COLUMNS = ("before", "after", *LATEST, "seconds")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Run]

    @property
    def whole(self) -> list[Run]:
        """Those that have come to their end."""
        return [run for run in self.runs if run.whole]

    @property
    def measure(self) -> str | None:
        """What they are judged by."""
        return next((run.measure for run in self.whole if run.measure), None)

    def number(self, column: str) -> str:
        """Mean and, of several runs, standard deviation."""
        found = [run.numbers[column] for run in self.whole if column in run.numbers]
        if not found:
            return "-"
        digits = ".0f" if column == "seconds" else ".2g" if column.startswith("KL") else ".3f"
        spread = f" ± {stdev(found):{digits.replace('2', '1')}}" if len(found) > 1 and column != "seconds" else ""
        return f"{mean(found):{digits}}{spread}"

    @property
    def findings(self) -> str:
        """What the monitor has found, and in how many of the runs if not in all."""
        watched = [run.read.findings for run in self.whole if run.read and run.read.findings is not None]
        if not watched:
            return "-"
        count = Counter(gate for findings in watched for gate in {finding["gate"] for finding in findings})
        told = [gate if n == len(self.whole) else f"{gate} ({n} of {len(self.whole)})" for gate, n in count.items()]
        return ", ".join(sorted(told)) or "none"


def runs_in(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, each a run's or one that holds runs' folders, in the order they were begun.

    Raises:
        InputError: there is none in one of them, or a file of one cannot be used.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if folder.is_file():
            raise InputError(f"{folder} is a file; give the folder of the run that it lies in")
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}")
        inside = _run_folders(folder)
        if not inside:
            raise InputError(f"{folder} holds no run: neither it nor a folder in it has a metrics.csv")
        found |= dict.fromkeys(path.resolve() for path in inside)
    return [Run.of(path) for path in sorted(found, key=_begun)]


def _run_folders(folder: Path) -> list[Path]:
    if (folder / "metrics.csv").is_file() or (folder / FAILED).is_file():
        return [folder]
    return [found for inner in sorted(folder.iterdir()) if inner.is_dir() for found in _run_folders(inner)]


def _begun(folder: Path) -> tuple[float, str]:
    first = folder / "config" / "config.yaml"
    return ((first if first.is_file() else folder).stat().st_mtime, str(folder))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The groups, named after the overrides in which they differ."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides if key not in ("seed", "ckpt_path"))
    differing = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        given = [(key, run.overrides[key]) for key in differing if key in run.overrides]
        name = " ".join(value if key == "algo" else f"{key}={value}" for key, value in given)
        groups.setdefault(name or _algorithm(run), []).append(run)
    return [Group(name, members) for name, members in groups.items()]


def _algorithm(run: Run) -> str:
    return run.overrides.get("algo") or (run.read.algorithm if run.read else "") or run.folder.name


def rows(groups: Sequence[Group]) -> list[list[str]]:
    """The table, its head first; columns that nobody has a number for are left out."""
    kept = [column for column in COLUMNS if any(group.number(column) != "-" for group in groups)]
    table = [["", "runs", "on held-out data", *kept, "findings"]]
    for group in groups:
        whole, all_ = len(group.whole), len(group.runs)
        table.append(
            [
                group.name,
                str(all_) if whole == all_ else f"{whole} of {all_}",
                MEASURES[group.measure] if group.measure else "-",
                *(group.number(column) for column in kept),
                group.findings,
            ]
        )
    return table


def text(groups: Sequence[Group]) -> str:
    """The table for a terminal, and under it the runs that are not in it."""
    table = rows(groups)
    return "\n".join([aligned(table, left=(0, 2, len(table[0]) - 1)), *_left_out(groups)])


def markdown(groups: Sequence[Group], figure: str | None) -> str:
    """The same as a page, with the figure where there is one."""
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows(groups))
    lines = [head, ["---"] * len(head), *body]
    parts = ["\n".join(f"| {' | '.join(line)} |" for line in lines), *_left_out(groups), CAPTION]
    return "\n\n".join([*parts, *([f"![Curves of the runs]({figure})"] if figure else [])]) + "\n"


CAPTION = (
    "Mean ± standard deviation over runs that differ in their seed alone; before: ahead of the first step; reward and "
    f"KL (nats per token): mean of the last {LAST} rollouts; seconds: of training; findings: of the stability monitor."
)


def _left_out(groups: Sequence[Group]) -> list[str]:
    """A line for each run that is in none of the table's numbers."""
    told = [("failed", run, run.failed) for group in groups for run in group.runs]
    told += [("unfinished", run, run.unfinished) for group in groups for run in group.runs]
    return [f"{what}: {run.folder.name}: {why}" for what, run, why in told if why]


def write_csv(groups: Sequence[Group], file: Path) -> None:
    """A line per run, for whoever wants other statistics."""
    head = ["group", "seed", "folder", "measure", *COLUMNS, "findings", "failed", "unfinished"]
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(head)
        for group in groups:
            for run in group.runs:
                gates = [finding["gate"] for finding in (run.read.findings if run.read else None) or []]
                numbers = [short(n) if (n := run.numbers.get(c)) is not None else "" for c in COLUMNS]
                seed = run.overrides.get("seed") or (run.read.config.get("seed", "") if run.read else "")
                first = [group.name, seed, run.folder.name, run.measure or ""]
                writer.writerow(
                    [*first, *numbers, "; ".join(dict.fromkeys(gates)), run.failed or "", run.unfinished or ""]
                )

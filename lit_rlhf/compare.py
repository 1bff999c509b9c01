"""Compare runs: `python -m lit_rlhf.compare FOLDER [FOLDER ...]`.

Each folder is a run's, or one that holds runs' folders, as a sweep's does. A table is printed; `comparison.md`,
`comparison.csv` and, with matplotlib, `comparison.png` are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_rlhf.errors import InputError
from lit_rlhf.failing import fail
from lit_rlhf.monitoring.comparison import Group, grouped, markdown, runs_in, text, write_csv
from lit_rlhf.monitoring.comparison_figure import draw


@dataclass(frozen=True)
class Comparison:
    """What was compared, and which runs had failed."""

    groups: list[Group]

    @property
    def failed(self) -> list[str]:
        """The names of their folders."""
        return [run.folder.name for group in self.groups for run in group.runs if run.failed]


def compare(folders: Sequence[str | Path], target: str | Path) -> Comparison:
    """Print the table, and write it and the figure into the folder `target`.

    Raises:
        InputError: there is no run in one of the folders, or a file of one cannot be used.
    """
    groups, target = grouped(runs_in(folders)), Path(target)
    figure: str | None = "comparison.png"
    missing = None
    try:
        if not draw(groups, target / "comparison.png"):
            figure = None
    except ImportError:
        figure, missing = None, "no figure: it needs the package matplotlib: pip install 'lit_rlhf[plots]'"
    (target / "comparison.md").write_text(markdown(groups, figure), encoding="utf-8")
    write_csv(groups, target / "comparison.csv")
    print(f"\n{text(groups)}")
    if missing:
        print(missing)
    return Comparison(groups)


def main() -> None:
    """Entry point of `python -m lit_rlhf.compare`."""
    lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m lit_rlhf.compare", description=__doc__, formatter_class=lines)
    parser.add_argument("folder", nargs="+", help="of a run, or of several")
    parser.add_argument("--out", help="where to write; by default the folder, or here if there are several")
    given = parser.parse_args()
    target = Path(given.out or (given.folder[0] if len(given.folder) == 1 else ".")).resolve()
    try:
        if given.out:
            target.mkdir(parents=True, exist_ok=True)
        compare(given.folder, target)
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or target} cannot be used ({error.strerror or error}); --out says where to write")
    print(target)


if __name__ == "__main__":
    main()

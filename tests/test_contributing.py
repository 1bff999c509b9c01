"""CONTRIBUTING's example is done as it says, in a copy of the checkout, and its tests are green."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
# `file`:   or   `file`, below `a part of a line`:   or   `file`, at the end:   and then a block
PLACE = r"^`([^`\n]+)`(?:, (?:below (`[^`\n]+`|``[^\n]+?``)|(at the end)))?:\n\n(`{3,})\w*\n(.*?)^\4$"
PARTS = ("lit_rlhf", "conf", "tests", "docs", "README.md", "CONTRIBUTING.md", "pyproject.toml")


def follow(text, root):
    """Write what the text says, where it says; the files."""
    written = []
    for name, below, at_the_end, _, block in re.findall(PLACE, text, flags=re.MULTILINE | re.DOTALL):
        file = root / name
        if below or at_the_end:
            lines = file.read_text().splitlines(keepends=True)
            anchor = below.strip("`").strip()
            places = [i for i, line in enumerate(lines) if anchor in line] if below else [len(lines) - 1]
            assert len(places) == 1, f"{len(places)} lines of {name} have {anchor}"
            lines.insert(places[0] + 1, block if below else f"\n{block}")
            file.write_text("".join(lines))
        else:
            assert not file.exists(), f"{name} is there already"
            file.write_text(block)
        written.append(name)
    return written


@pytest.mark.slow
def test_somebody_who_does_as_it_says_ends_with_all_tests_green(tmp_path):
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        else:
            shutil.copy(ROOT / part, tmp_path / part)
    written = follow(TEXT, tmp_path)
    new = [name for name in written if not (ROOT / name).exists()]
    assert new == ["lit_rlhf/algorithms/opo.py", "conf/algo/opo.yaml", "tests/algorithms/test_opo.py"]
    source = (tmp_path / new[0]).read_text()
    assert len(source.splitlines()) <= 70, "one screen"

    tests = ["opo", "gradients", "limits", "padding", "paper_losses", "parts", "splits", "warnings"]
    tests = [f"tests/algorithms/test_{name}.py" for name in tests]
    others = ["algorithm_pages", "config", "dict_formats", "every_algorithm", "help", "layers"]
    tests += [f"tests/test_{name}.py" for name in others]
    only = "opo or public or minute or guide or recorded or inherits"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-k", only, *tests]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-5000:]
    passed = set(re.findall(r"^PASSED \S+::(\S+)", ended.stdout, flags=re.MULTILINE))
    assert len(passed) >= 50
    assert {"test_it_runs_from_the_command_line[opo]", "test_the_example_runs[OPO]"} <= passed
    assert "test_no_other_baseline_has_less_variance" in passed
    assert "test_the_defaults_of_a_page_are_those_of_the_code[opo]" in passed
    ruff = subprocess.run(["ruff", "check", *new[::2]], cwd=tmp_path, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout

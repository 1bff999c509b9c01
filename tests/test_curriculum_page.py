"""docs/curriculum.md: its defaults are those of the code, and its figures those recorded."""

import inspect
import json
import re
import sys
from pathlib import Path

from lit_rlhf.rollouts.curriculum import SuccessCurriculum

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "curriculum.md").read_text()


def test_the_defaults_are_those_of_the_code():
    stated = dict(re.findall(r"^\| `algo\.(\w+)` \| `?([^`|]+?)`? \|", TEXT, flags=re.MULTILINE))
    parameters = inspect.signature(SuccessCurriculum).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert stated == {name: "null" if value is None else str(value) for name, value in defaults.items()}


def test_the_table_is_of_the_recorded_runs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import curriculum

    recorded = json.loads((ROOT / "docs" / "curriculum.json").read_text())
    assert curriculum.table(recorded) in TEXT
    sys.modules.pop("curriculum")

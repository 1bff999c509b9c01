"""docs/algorithms.md: a page for every algorithm, whose defaults are those of the code and whose metrics exist."""

import inspect
import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_rlhf.algorithms.critic import Critic
from lit_rlhf.config import conf_dir
from tests.test_config import ALGORITHMS, target_of
from tests.test_every_algorithm import NAMES
from tests.test_readme import documented

TEXT = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
PAGES = dict(re.findall(r"\n## `(\w+)`: [^\n]*\n(.*?)(?=\n## |\Z)", TEXT, flags=re.DOTALL))
RECORDED = json.loads((Path(__file__).parents[1] / "docs" / "learning_curves.json").read_text())
WORDS = {"none": "None", "true": "True", "false": "False"}


def table(page, heading):
    """The rows of the page's table that begins with this heading, as lists of cells."""
    lines = page.split(f"| {heading} |", 1)[1].splitlines()[2:]
    rows = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows]


def default_of(config, name):
    """The yaml's own value, the constructor's default, or what the class states."""
    target = target_of(config["_target_"])
    name = {"lr": "usual_lr"}.get(name, name)
    if name in config or hasattr(target, name):
        return config.get(name, getattr(target, name, None))
    for owner in (*target.__mro__, Critic):
        parameter = inspect.signature(owner.__init__).parameters.get(name) if owner is not object else None
        if parameter is not None and parameter.default is not parameter.empty and parameter.default is not None:
            return parameter.default
    return None


def test_every_algorithm_has_a_page_and_a_row_in_the_guide():
    assert set(PAGES) == set(ALGORITHMS)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    guide = readme.split("\n## Which algorithm\n")[1].split("\n[docs/algorithms.md]")[0]
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", guide, flags=re.MULTILINE)))) == set(
        ALGORITHMS
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_defaults_of_a_page_are_those_of_the_code(name):
    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "algo" / f"{name}.yaml"))
    rows = table(PAGES[name], "argument | default | source")
    assert rows
    for arguments, defaults, _ in rows:
        names, values = re.findall(r"`(\w+)`", arguments), defaults.split(", ")
        for argument, value in zip(names, values * len(names) if len(values) == 1 else values, strict=True):
            found = default_of(config, argument)
            assert str(found) == WORDS.get(value, value) or float(found) == float(value), argument


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_metrics_of_a_page_are_logged(name):
    watched = [re.findall(r"`([^`]+)`", cells[0]) for cells in table(PAGES[name], "watch | healthy")]
    assert watched
    assert {metric for metrics in watched for metric in metrics} <= documented()


def test_a_page_with_results_has_them_recorded():
    assert {name for name, page in PAGES.items() if "**On the built-in task** with seeds" in page} == set(RECORDED)
    assert len(RECORDED) >= len(NAMES) - 1, "all but SFT, which makes the model that the others start from"


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_the_results_of_a_page_are_those_recorded(name):
    """What `benchmarks/learning_curves.py` has left, and the bar that every algorithm has to pass."""
    curves = [run["curve"] for _, run in sorted(RECORDED[name].items())]
    text = " ".join(PAGES[name].split("**On the built-in task**")[1].split())
    for measure, words in (
        ("accuracy_sampled", "sampled accuracy from 0.462 to"),
        ("preference_accuracy", "preference"),
    ):
        if measure in curves[0]:
            said = re.findall(r"\d\.\d{3}", text.split(words)[1].split(";")[0])
            assert said == [f"{curve[measure][-1]:.3f}" for curve in curves]
    assert len(curves) == 3
    if name == "reward_modeling" or "dpo" in name or name == "ipo":
        assert min(curve["preference_accuracy"][-1] for curve in curves) >= 0.95
        assert all(
            c["accuracy_sampled"][-1] >= c["accuracy_sampled"][0] + 0.2 for c in curves if "accuracy_sampled" in c
        )
    else:
        assert min(curve["accuracy_sampled"][-1] for curve in curves) >= 0.85

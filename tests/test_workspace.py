"""The workspace's layout, looked at without W&B; and what is said where it cannot be saved."""

import os
import subprocess
import sys

import pytest

from lit_rlhf.errors import InputError
from lit_rlhf.workspace import LAYOUT, save, workspace
from tests.test_readme import documented

SECTIONS = ["reward", "stability", "loss", "rollout", "preference", "val", "perf"]


def panels_of(built):
    """What W&B would be sent, by section: (kind, x-axis, metrics) of every panel."""
    spec = built._to_model().model_dump(by_alias=True)["spec"]["section"]["panelBankConfig"]["sections"]
    return {
        section["name"]: [
            (panel["viewType"], panel["config"].get("xAxis"), panel["config"].get("metrics"))
            for panel in section["panels"]
        ]
        for section in spec
    }


def test_sections_stand_in_order_and_rollouts_are_the_axis():
    pytest.importorskip("wandb_workspaces")
    built = workspace("me", "mine", "view")
    assert (built.entity, built.project, built.name) == ("me", "mine", "view")
    found = panels_of(built)
    assert list(found) == SECTIONS
    for section, panels in found.items():
        lines = [panel for panel in panels if panel[0] == "Run History Line Plot"]
        assert len(lines) == len(panels) - (section == "rollout"), "one of them is the table"
        assert {axis for _, axis, _ in lines} == {"trainer/global_step" if section == "val" else "rollout/iteration"}
        assert {metric.split("/")[0] for _, _, metrics in lines for metric in metrics} == {section}
    assert ("Run History Line Plot", "rollout/iteration", ["stability/approx_kl"]) in found["stability"]
    assert "samples" in str(built._to_model().model_dump())


def test_every_metric_of_the_layout_is_one_that_runs_log():
    shown = {metric for panels in LAYOUT.values() for metrics in panels for metric in metrics}
    beside = {"samples", "reward/histogram", "stability/ratio_histogram", "rollout/length_histogram"}
    beside |= {"reward/reward_std", "val/reward_sampled", "val/response_length_sampled"}  # README: `..., _std`
    assert shown - beside <= documented()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("mine", "give the workspace's place as ENTITY/PROJECT, got 'mine'"),
        ("a/b/c", "give the workspace's place as ENTITY/PROJECT, got 'a/b/c'"),
        ("/b", "give the workspace's place as ENTITY/PROJECT, got '/b'"),
    ],
)
def test_a_place_that_is_none(place, sentence):
    with pytest.raises(InputError, match=sentence):
        save(place, "view")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(InputError, match=r"needs the package wandb-workspaces: pip install 'lit_rlhf\[wandb\]'"):
        workspace("me", "mine")


@pytest.mark.slow
def test_without_a_login_it_is_one_sentence(tmp_path):
    pytest.importorskip("wandb_workspaces")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    ended = subprocess.run(
        [sys.executable, "-m", "lit_rlhf.workspace", "me/mine"],
        env={**env, "NETRC": os.devnull},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    sentence = "error: a workspace is saved in your W&B account, and nobody is logged in; run wandb login first\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", sentence)

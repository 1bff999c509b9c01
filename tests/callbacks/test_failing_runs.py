"""Runs that are made to fail are named, each by what is wrong with it; sound runs raise nothing."""

import pytest

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.monitoring.gates import GATES
from tests.callbacks.failing import FAILING, LR, findings_of

NAMED = {  # what fails -> its finding, when that begins, what the advice has, and what follows from it
    "learning rate": ("kl", range(1, 3), "lower algo.lr", {"no signal", "truncation", "entropy collapse"}),
    "entropy": ("entropy collapse", range(2, 12), "algo.entropy_coef", set()),
    "pays for length": ("length", range(2, 8), "the reward function may pay for length", {"truncation"}),
    "one reward for all": ("no signal", [1], "a reward with more levels", set()),
    "the reward turns around": ("reward lost", range(16, 19), "an earlier checkpoint", set()),
    "rewards in thousands": ("advantages", [1], "scale the rewards", set()),
    "rewards grow to thousands": ("gradient", range(9, 11), "the rewards' scale", {"advantages"}),
    "next to no clip range": ("clipping", [1], "would clip more", set()),
    "cut off": ("truncation", [1], "raise rollout.max_new_tokens", set()),
    "shouting value head": ("value function", [1], "another algo.value_lr", set()),
    "biased value head": ("value function", [1], "another algo.value_lr", set()),
    "noise": ("no progress", [1], "check the reward function by hand", set()),
    "old weights in the engine": ("mismatch", range(2, 6), "whether it has this run's weights", set()),
    "not finite": ("nan", [3], "nonfinite/", set()),
    "stale": ("off-policy", range(2, 6), "algo.buffer_size", set()),
    "learnt by heart": ("overfit", range(8, 20), "fewer passes", set()),
    "learning rate of SFT": ("loss", range(1, 3), "lower algo.lr", set()),
    "no preference": ("preferences", [1], "raise algo.lr", set()),
    "wrong way round": ("preferences", [1], "the right way round", set()),
    "learning rate of DPO": ("forgetting", [2], "lower algo.lr", set()),
}


def test_every_failing_run_has_a_name():
    assert NAMED.keys() == FAILING.keys()


def test_all_ways_of_failing_but_two_are_run():
    """The tiny model has never shown a ratio of 100, nor an entropy that doubles, whatever it was made to learn."""
    run = {gate for gate, *_ in NAMED.values()}
    assert {gate.name for gate in GATES} - run == {"ratio", "entropy explosion"}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NAMED))
def test_runs_that_are_made_to_fail_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # rows of steps that are left out are written there
    algorithm, arguments, rollouts, more = FAILING[name]
    gate, begins, advice, follows = NAMED[name]
    findings = findings_of(algorithm, arguments, rollouts, **more)
    found = {finding.gate: finding for finding in findings}
    assert gate in found, findings
    assert found.keys() <= {gate, *follows}, findings
    assert found[gate].since in begins, findings
    assert advice in found[gate].advice


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_sound_runs_raise_nothing(seed):
    assert findings_of(GRPO, {"lr": LR, "seed": seed}, 35) == []

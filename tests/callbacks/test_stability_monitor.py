"""The monitor names what is wrong, since when, and what to change; of sound runs it says nothing."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.callbacks.stability_monitor import StabilityMonitor
from lit_rlhf.errors import InputError
from lit_rlhf.monitoring.gates import GATES, Healthy
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import fit_of
from tests.helpers import prompt_rows

SOUND = {
    "stability/approx_kl": 0.005,
    "stability/clip_fraction": 0.02,
    "stability/ratio_max": 1.5,
    "stability/entropy": 0.5,
    "stability/advantage_std": 0.9,
    "stability/explained_variance": 0.6,
    "stability/grad_norm": 2.0,
    "stability/skipped_fraction": 0.0,
    "stability/ess": 0.9,
    "stability/mismatch_kl": 0.001,
    "reward/reward_mean": 0.5,
    "reward/accuracy": 0.5,
    "reward/zero_std_fraction": 0.3,
    "reward/length_correlation": 0.1,
    "rollout/response_length": 20.0,
    "rollout/truncated_fraction": 0.02,
    "preference/preference_accuracy": 0.7,
}
SICK = {  # what goes wrong from rollout 20 on, as functions of the rollouts since
    "nan": {"stability/skipped_fraction": lambda n: 0.25},
    "kl": {"stability/approx_kl": lambda n: 0.08},
    "clipping": {"stability/clip_fraction": lambda n: 0.4},
    "ratio": {"stability/ratio_max": lambda n: 1e4},
    "entropy collapse": {"stability/entropy": lambda n: 0.5 * 0.5**n},
    "entropy explosion": {"stability/entropy": lambda n: 1.5},
    "reward lost": {"reward/reward_mean": lambda n: 0.1},
    "no signal": {"reward/zero_std_fraction": lambda n: 0.97},
    "truncation": {"rollout/truncated_fraction": lambda n: 0.8},
    "length": {"rollout/response_length": lambda n: 20.0 + 3 * n, "reward/length_correlation": lambda n: 0.8},
    "advantages": {"stability/advantage_std": lambda n: 40.0},
    "value function": {"stability/explained_variance": lambda n: -3.0},
    "mismatch": {"stability/mismatch_kl": lambda n: 0.2},
    "off-policy": {"stability/ess": lambda n: 0.1},
    "gradient": {"stability/grad_norm": lambda n: 500.0},
    "preferences": {"preference/preference_accuracy": lambda n: 0.5},
}


def watch(monitor, rollouts, changed=lambda n: {}, module=None):
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    for n in rollouts:
        rising = {"reward/reward_mean": 0.5 + 0.002 * n, "reward/accuracy": 0.5 + 0.002 * n}
        values = {**SOUND, **rising, **changed(n), "rollout/iteration": float(n)}
        monitor.on_metrics(trainer, module or SimpleNamespace(), values)
    return monitor


def test_of_a_sound_run_it_says_nothing(capsys):
    assert watch(StabilityMonitor(), range(1, 200)).findings == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", list(SICK))
def test_each_sickness_is_named_once_with_its_beginning_and_what_to_change(name, capsys):
    sick = SICK[name]
    monitor = watch(
        StabilityMonitor(), range(1, 60), lambda n: {k: f(n - 20) for k, f in sick.items()} if n >= 20 else {}
    )
    (finding,) = monitor.findings
    assert finding.gate == name
    assert 20 <= finding.since <= 35, "the median of ten rollouts has turned by then"
    assert finding.until is None
    said = capsys.readouterr().err
    assert said.count(f"[{name}] since rollout {finding.since}: ") == 1
    assert finding.says in said
    assert finding.advice in said
    assert re.search(r"\d", finding.says), "how bad it is"


def test_a_run_that_gets_nowhere_is_told(capsys):
    noise = torch.randn(250, generator=torch.Generator().manual_seed(0)).mul(0.05).add(0.5).tolist()
    flat = lambda n: {"reward/reward_mean": noise[n], "reward/accuracy": noise[n]}  # noqa: E731
    monitor = watch(StabilityMonitor(), range(1, 230), flat)
    assert {finding.gate for finding in monitor.findings} == {"no progress"}
    assert monitor.findings[0].since >= 200


def test_every_gate_is_tested_here():
    assert {gate.name for gate in GATES} == {*SICK, "no progress"}


def test_one_bad_rollout_is_no_finding():
    for name, sick in SICK.items():
        if name != "nan":
            once = lambda n, sick=sick: {k: f(30) for k, f in sick.items()} if n == 30 else {}  # noqa: E731
            assert watch(StabilityMonitor(), range(1, 60), once).findings == [], name


def test_what_is_over_is_said_to_be_over_and_told_again_when_it_comes_back(capsys):
    bad = lambda n: {"stability/approx_kl": 0.1} if n in range(20, 40) or n in range(70, 90) else {}  # noqa: E731
    first, second = watch(StabilityMonitor(), range(1, 120), bad).findings
    assert 40 <= first.until <= 50
    assert 70 <= second.since <= 80
    assert second.until is not None
    assert capsys.readouterr().err.count("[kl]") == 2


def test_nothing_left_to_learn_is_success():
    solved = lambda n: {"reward/accuracy": 0.97, "reward/zero_std_fraction": 0.99, "stability/advantage_std": 0.0}  # noqa: E731
    assert watch(StabilityMonitor(), range(1, 60), solved).findings == []


def test_groups_without_signal_matter_to_those_who_compare_within_groups():
    equal = lambda n: {"reward/zero_std_fraction": 1.0}  # noqa: E731
    for algorithm, expected in ((GRPO, ["no signal"]), (RLOO, ["no signal"]), (PPO, [])):
        module = algorithm(group_size=2)
        assert [f.gate for f in watch(StabilityMonitor(), range(1, 60), equal, module).findings] == expected


def test_bounds_of_one_s_own():
    moved = lambda n: {"stability/approx_kl": 0.08}  # noqa: E731
    assert watch(StabilityMonitor(bounds={"approx_kl": 0.1}), range(1, 60), moved).findings == []
    for bounds, sentence in (
        ({"aprox_kl": 0.1}, "callbacks.monitor.bounds.aprox_kl: there is no such bound; known: approx_kl, "),
        ({"approx_kl": "x"}, "callbacks.monitor.bounds.approx_kl must be like 0.05, got 'x'"),
        ({"advantage_std": 1.0}, r"bounds.advantage_std must be like \(0.1, 10.0\), got 1.0"),
    ):
        with pytest.raises(InputError, match=sentence):
            StabilityMonitor(bounds=bounds)
    with pytest.raises(InputError, match=r"callbacks.monitor.patience must be at least 1, got -3"):
        StabilityMonitor(patience=-3)


def test_findings_are_written_down_those_of_before_a_resume_too(tmp_path):
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    bad = lambda n: {"stability/approx_kl": 0.1}  # noqa: E731
    before = watch(StabilityMonitor(file=tmp_path / "first.json"), range(1, 25), bad)
    assert [found["gate"] for found in json.loads((tmp_path / "first.json").read_text())] == ["kl"]
    after = StabilityMonitor(file=tmp_path / "second.json")
    after.load_state_dict(before.state_dict())
    after.on_train_start(trainer, None)
    assert (tmp_path / "second.json").read_text() == (tmp_path / "first.json").read_text()
    sound = StabilityMonitor(file=tmp_path / "sound.json")
    sound.on_train_start(trainer, None)
    assert json.loads((tmp_path / "sound.json").read_text()) == []


def test_a_resumed_monitor_goes_on_where_it_was():
    bad = lambda n: {"stability/approx_kl": 0.1} if n >= 18 else {}  # noqa: E731
    whole = watch(StabilityMonitor(), range(1, 60), bad)
    before = watch(StabilityMonitor(), range(1, 25), bad)
    after = StabilityMonitor()
    after.load_state_dict(before.state_dict())
    assert watch(after, range(25, 60), bad).findings == whole.findings


# runs that are made to fail


def long_is_good(completion_ids, **kwargs):
    return [len(ids) / 10 for ids in completion_ids]


def never(completion_ids, **kwargs):
    return [0.0 for _ in completion_ids]


def even(completion_ids, **kwargs):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


class BrokenHead(PPO):
    """Its value function answers with the number of tokens so far, a hundredfold."""

    def score_rollout(self, rollout):
        rollout = super().score_rollout(rollout)
        return replace(rollout, values=rollout.response_mask.cumsum(1) * 100.0)


class Noise:
    """A reward that has nothing to do with the completion."""

    __name__ = "noise"

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, completion_ids, **kwargs):
        return torch.rand(len(completion_ids), generator=self.generator).tolist()


ENDS = [str(token) for token in range(2, 18)]  # a random model ends after four tokens, as an answer may
SAMPLING = SamplingConfig(max_new_tokens=24, stop=ENDS)
SIZES = {"group_size": 4, "prompts_per_rollout": 8, "sampling": SAMPLING, "warmup_steps": 0}
FAILING = {
    "learning rate": (GRPO, {"lr": 0.3, "reward_funcs": [even], "minibatches": 2}, {"kl", "entropy collapse", "ratio"}),
    "pays for length": (DAPO, {"lr": 1e-2, "reward_funcs": [long_is_good], "max_rounds": 1}, {"length"}),
    "never pays": (GRPO, {"lr": 1e-3, "reward_funcs": [never]}, {"no signal"}),
    "cut off": (
        GRPO,
        {"reward_funcs": [even], "lr": 1e-3, "sampling": SamplingConfig(max_new_tokens=3)},
        {"truncation"},
    ),
    "broken value head": (BrokenHead, {"reward_funcs": [even], "lr": 1e-3}, {"value function"}),
    "noise": (GRPO, {"reward_funcs": [Noise()], "lr": 1e-3}, {"no progress"}),
}


def findings_of(algorithm, arguments, rollouts, **bounds):
    monitor = StabilityMonitor(bounds=bounds)
    torch.set_num_threads(1)
    fit_of(algorithm, {**SIZES, **arguments}, rollouts, callbacks=[monitor], rows=prompt_rows(32))
    return monitor.findings


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAILING))
def test_runs_that_are_made_to_fail_are_named(name):
    algorithm, arguments, expected = FAILING[name]
    bounds = {"progress_rollouts": 25} if name == "noise" else {}
    found = findings_of(algorithm, arguments, 35, **bounds)
    assert {finding.gate for finding in found} & expected, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_sound_runs_raise_nothing(seed):
    arguments = {"reward_funcs": [even], "lr": 3e-3, "seed": seed, "minibatches": 2}
    assert findings_of(GRPO, arguments, 35) == []


def test_the_bounds_are_those_that_are_written_down():
    assert (Healthy().approx_kl, Healthy().clip_fraction) == (0.05, 0.3)

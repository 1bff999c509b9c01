"""The monitor names what is wrong, since when, and what to change; of sound runs it says nothing."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.callbacks.stability_monitor import StabilityMonitor
from lit_rlhf.errors import InputError
from lit_rlhf.monitoring.gates import GATES
from lit_rlhf.monitoring.healthy import Healthy

SOUND = {
    "stability/approx_kl": 0.005,
    "stability/clip_fraction": 0.02,
    "stability/ratio_max": 1.5,
    "stability/entropy": 0.5,
    "stability/advantage_std": 0.9,
    "stability/explained_variance": 0.6,
    "stability/value_mean": 0.4,
    "stability/return_mean": 0.5,
    "stability/return_std": 0.3,
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
    "preference/chosen_logps": -20.0,
    "val/preference_accuracy": 0.65,
    "val/sft_loss": 0.6,
    "loss/loss": 0.55,
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
    "forgetting": {"preference/chosen_logps": lambda n: -41.0},
    "overfit": {"val/sft_loss": lambda n: 0.7},
}
BEGINS = {  # of what wanes or grows slowly, when a single rollout is beyond the bound
    "entropy collapse": 26,  # 0.5 * 0.5 ** 6 < max(0.03 * 0.5, 0.01)
    "length": 24,  # 20 + 3 * 4 > 1.5 * 20
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
    assert finding.since == BEGINS.get(name, 20)
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
    (finding,) = monitor.findings
    assert finding.since == 1, "of the whole run"
    assert "after 20" in finding.says


def test_every_gate_is_tested_here():
    assert {gate.name for gate in GATES} == {*SICK, "no progress", "loss"}


def test_one_bad_rollout_is_no_finding():
    for name, sick in SICK.items():
        if name not in ("nan", "forgetting"):
            once = lambda n, sick=sick: {k: f(30) for k, f in sick.items()} if n == 30 else {}  # noqa: E731
            assert watch(StabilityMonitor(), range(1, 60), once).findings == [], name


def test_what_is_over_is_said_to_be_over_and_told_again_when_it_comes_back(capsys):
    bad = lambda n: {"stability/approx_kl": 0.1} if n in range(20, 40) or n in range(70, 90) else {}  # noqa: E731
    first, second = watch(StabilityMonitor(), range(1, 120), bad).findings
    assert 40 <= first.until <= 50
    assert 70 <= second.since <= 80
    assert second.until is not None
    assert capsys.readouterr().err.count("[kl]") == 2


def test_what_is_extreme_is_told_at_once(capsys):
    for name, metric, bound in (
        ("kl", "stability/approx_kl", Healthy().approx_kl),
        ("mismatch", "stability/mismatch_kl", Healthy().mismatch_kl),
    ):
        for rollout in (1, 30):
            for value, expected in ((11 * bound, [name]), (9 * bound, [])):
                monitor = watch(
                    StabilityMonitor(),
                    range(1, rollout + 1),
                    lambda n, m=metric, v=value, r=rollout: {m: v} if n == r else {},
                )
                assert [f.gate for f in monitor.findings] == expected
                assert all(f.since == rollout and f"{value:.3g}" in f.says for f in monitor.findings)
    said = capsys.readouterr().err
    assert said.count("[kl] since rollout 1: ") == said.count("[kl] since rollout 30: ") == 1


def test_a_single_extreme_rollout_is_over_with_the_next():
    spike = lambda n: {"stability/approx_kl": 3.0} if n == 20 else {}  # noqa: E731
    (finding,) = watch(StabilityMonitor(), range(1, 60), spike).findings
    assert (finding.since, finding.until) == (20, 21)


@pytest.mark.parametrize("begins", [2, 8, 20, 47])
def test_the_beginning_is_that_of_the_trouble_and_not_of_its_discovery(begins):
    generator = torch.Generator().manual_seed(begins)
    noise = torch.rand(100, generator=generator).tolist()
    bad = lambda n: {"stability/approx_kl": 0.04 + 0.1 * noise[n] if n >= begins else 0.04 * noise[n]}  # noqa: E731
    (finding,) = watch(StabilityMonitor(), range(1, 90), bad).findings
    first = next(n for n in range(begins, 100) if 0.04 + 0.1 * noise[n] > 0.05)
    assert finding.since == first, "a single rollout below the bound changes nothing"
    assert finding.until is None


def test_a_single_bad_rollout_before_is_not_the_beginning():
    bad = lambda n: {"stability/approx_kl": 0.08} if n == 16 or n >= 20 else {}  # noqa: E731
    (finding,) = watch(StabilityMonitor(), range(1, 60), bad).findings
    assert finding.since == 20


def test_what_comes_back_within_the_patience_is_the_same_finding():
    nan = lambda n: {"stability/skipped_fraction": 0.5} if n in (20, 23) else {}  # noqa: E731
    (finding,) = watch(StabilityMonitor(), range(1, 60), nan).findings
    assert (finding.since, finding.until) == (20, 24)


def test_a_held_out_loss_that_rises_with_that_of_training_is_not_overfitting():
    rises = lambda n: {"val/sft_loss": 0.7, "loss/loss": 0.65} if n >= 20 else {}  # noqa: E731
    assert watch(StabilityMonitor(), range(1, 60), rises).findings == []


def test_a_loss_above_its_beginning_is_told_of_passes_and_not_of_rollouts():
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    for more, expected in (({}, [("loss", 3, "pass")]), ({"stability/approx_kl": 0.01}, [])):
        monitor = StabilityMonitor()
        for n, loss in enumerate((2.0, 1.5, 2.3, 2.5), start=1):
            monitor.on_metrics(trainer, SimpleNamespace(), {"loss/loss": loss, "rollout/iteration": float(n), **more})
        assert [(f.gate, f.since, f.unit) for f in monitor.findings] == expected


def test_pairs_learnt_by_heart_are_told_once_and_since_when():
    trainer, monitor = SimpleNamespace(is_global_zero=True, loggers=[]), StabilityMonitor()
    for n in range(1, 31):
        held_out = 0.75 if n < 12 else 0.65
        monitor.on_metrics(trainer, SimpleNamespace(), {"val/preference_accuracy": held_out})
        values = {"preference/preference_accuracy": 0.7 + 0.01 * n, "rollout/iteration": float(n)}
        monitor.on_metrics(trainer, SimpleNamespace(), values)
    (finding,) = monitor.findings
    assert (finding.gate, finding.since, finding.until, finding.unit) == ("overfit", 12, None, "pass")
    assert finding.says == "of the held-out pairs 0.75 were in order and now 0.65, of the training pairs 0.83"


def test_a_value_function_is_told_by_its_mean_too():
    for value, expected in ((1.3, []), (1.5, ["value function"]), (-0.5, ["value function"])):  # 0.5 +- 3 * 0.3
        monitor = watch(StabilityMonitor(), range(1, 60), lambda n, v=value: {"stability/value_mean": v})
        assert [f.gate for f in monitor.findings] == expected


def test_a_sequence_s_ratio_is_clipped_more_often():
    clipped = lambda n: {"stability/clip_fraction": 0.45}  # noqa: E731
    for module, expected in ((GRPO(), ["clipping"]), (GSPO(), []), (GRPO(policy_loss="gspo_token"), [])):
        assert [f.gate for f in watch(StabilityMonitor(), range(1, 60), clipped, module).findings] == expected


def test_one_cause_is_one_finding():
    """What follows from another finding is not told beside it, with advice that does not help."""
    for changed, expected in (
        ({"reward/zero_std_fraction": 1.0, "stability/advantage_std": 0.0}, "no signal"),
        ({"stability/mismatch_kl": 0.2, "stability/ess": 0.1}, "mismatch"),
    ):
        assert [f.gate for f in watch(StabilityMonitor(), range(1, 60), lambda n, c=changed: c).findings] == [expected]


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


@pytest.mark.parametrize(
    "bad",
    [
        lambda n: {"stability/approx_kl": 0.1} if n >= 18 else {},
        lambda n: {"stability/skipped_fraction": 0.5} if n == 22 else {},
        lambda n: {"val/sft_loss": 0.7} if n >= 12 else {},
    ],
    ids=["not yet named", "not yet over", "since long"],
)
def test_a_resumed_monitor_goes_on_where_it_was(bad):
    whole = watch(StabilityMonitor(), range(1, 60), bad)
    before = watch(StabilityMonitor(), range(1, 25), bad)
    after = StabilityMonitor()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert watch(after, range(25, 60), bad).findings == whole.findings
    assert len(whole.findings) == 1


OLDER = {  # a state of before it had a format
    "tracks": {"stability/approx_kl": [[0.01] * 5, [0.01] * 10, 0.01, 20]},
    "since": {"kl": 18},
    "findings": [{"gate": "kl", "since": 18, "says": "it moves", "advice": "lower algo.lr", "until": None}],
}


@pytest.mark.parametrize("state", [OLDER, {}, {"format": 2, "tracks": {}}, {**OLDER, "format": 2, "well": {}}])
def test_a_state_that_it_cannot_read_does_not_keep_a_run_from_going_on(state):
    monitor = StabilityMonitor()
    with pytest.warns(UserWarning, match="the checkpoint's stability monitor is of another version; it") as warned:
        monitor.load_state_dict(state)
    assert len(warned) == 1
    assert watch(monitor, range(25, 60)).findings == []
    bad = watch(monitor, range(60, 80), lambda n: {"stability/approx_kl": 0.1})
    assert [finding.gate for finding in bad.findings] == ["kl"]


def test_the_bounds_are_those_that_are_written_down():
    assert (Healthy().approx_kl, Healthy().clip_fraction) == (0.05, 0.3)


def test_the_page_has_every_finding_with_its_metrics_and_bounds():
    page = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text().split("\n## ")[0]
    rows = {
        row[0].strip("` "): row for row in (line.strip("| ").split(" | ") for line in page.splitlines()) if len(row) > 2
    }
    assert [name for name in rows if name not in ("finding", "---")] == [gate.name for gate in GATES]
    written = {}
    for gate in GATES:
        metrics, bounds = rows[gate.name][1], rows[gate.name][3] if len(rows[gate.name]) > 3 else ""
        assert all(name.split("/")[1] in metrics for name in gate.needs), gate.name
        written |= {name: float(number) for name, number in re.findall(r"`(\w+)` (-?[\d.]+)", bounds)}
    known = {name: bound[0] if isinstance(bound, tuple) else bound for name, bound in vars(Healthy()).items()}
    assert written == known

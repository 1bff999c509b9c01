"""Every on-policy algorithm resumes with what it keeps: baselines, coefficients, buffers, whether it has stopped."""

import pytest
import torch

from lit_rlhf.algorithms.cispo import CISPO
from lit_rlhf.algorithms.conservative_ppo import ConservativePPO
from lit_rlhf.algorithms.dr_grpo import DrGRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.reinforce_pp import REINFORCEPlusPlus
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import SaveAt, assert_same, everything, fit_of, loop_in
from tests.helpers import build, random_experience

ROLLOUTS, ACCUMULATE = 3, 2
SIZES = {"group_size": 2, "prompts_per_rollout": 4, "minibatches": 1, "update_epochs": 2}
SIZES |= {"sampling": SamplingConfig(max_new_tokens=3)}
ADAPTS = {"kl_coef": 0.3, "kl_in": "reward", "kl_target": 0.05, "kl_horizon": 20}
STOPPED = {"target_kl": 1e-6, "update_epochs": 3}  # by the second step
SETTINGS = {
    "PPO": (PPO, ADAPTS),
    "PPO shared": (PPO, {**ADAPTS, "kl_in": "both", "value": "shared"}),
    "PPO stopped": (PPO, {"value": "shared", **STOPPED}),
    "ConservativePPO": (ConservativePPO, {"adaptive": True, "max_kl_divergence": 1e-3, "value": "shared"}),
    "ConservativePPO stopped": (ConservativePPO, {"adaptive": True, "value": "shared", **STOPPED}),
    "DrGRPO": (DrGRPO, {}),
    "GSPO": (GSPO, {}),
    "CISPO": (CISPO, {}),
    "RLOO": (RLOO, ADAPTS),
    "REINFORCE": (REINFORCE, {"baseline_decay": 0.5}),
    "REINFORCE++": (REINFORCEPlusPlus, ADAPTS),
    "ReMax": (ReMax, {}),
    "ImportanceSampling": (ImportanceSampling, {"buffer_size": 2}),
}
WHERE = ("within a rollout", "within a step", "between two")


def stops(name):
    """Micro-batches taken: all but the last step's two of the second rollout, all but one of them, all."""
    rollout = ACCUMULATE * SETTINGS[name][1].get("update_epochs", 2)
    return dict(zip(WHERE, (2 * rollout - 2, 2 * rollout - 1, 2 * rollout), strict=True))


def fit(name, **arguments):
    algorithm, own = SETTINGS[name]
    return fit_of(algorithm, {**SIZES, **own}, ROLLOUTS, ACCUMULATE, **arguments)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run per setting that saves at every stop, and how it ended."""
    known = {}

    def run(name):
        if name not in known:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp("run")
            ended = fit(name, callbacks=[SaveAt(at, folder / where) for where, at in stops(name).items()])
            assert ended[1].global_step * ACCUMULATE == ROLLOUTS * stops(name)["between two"] // 2
            known[name] = folder, everything(*ended)
        return known[name]

    return run


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_ends_bit_for_bit_like_one_without_a_break(uninterrupted, name, where):
    folder, expected = uninterrupted(name)
    assert_same(everything(*fit(name, seed=1, ckpt_path=folder / where)), expected)


@pytest.mark.parametrize(
    ("name", "kept", "where"),
    [
        ("PPO", "kl_coef", "between two"),
        ("ConservativePPO", "conservative_coef", "within a rollout"),
        ("REINFORCE", "baseline_average", "between two"),
        ("REINFORCE", "baseline_rollouts", "between two"),
        ("ImportanceSampling", "replay", "between two"),
    ],
)
def test_what_is_kept_decides_how_the_run_goes_on(uninterrupted, name, kept, where, tmp_path):
    """Otherwise equal weights would not prove that it came back."""
    folder, expected = uninterrupted(name)
    checkpoint = torch.load(folder / where, weights_only=True)
    loop = checkpoint["lit_rlhf"]["ranks"][0]["loop"]
    if kept == "replay":
        assert [len(rollout["version"]) for rollout in loop["replay"]["rollouts"]] == [8, 8]
        loop["replay"] = None
    else:
        del loop["numbers"][kept]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    module, _ = fit(name, ckpt_path=tmp_path / "without.ckpt")
    weights = expected["weights"]
    same = [torch.equal(weights[key], weight) for key, weight in module.state_dict().items() if key in weights]
    assert not all(same)


def test_a_stopped_rollout_stays_stopped_and_the_next_one_begins_anew(uninterrupted):
    folder, expected = uninterrupted("PPO stopped")
    assert all("stopped" in loop_in(folder / where)["numbers"] for where in WHERE)
    before, after = (torch.load(folder / where, weights_only=True) for where in (WHERE[0], WHERE[2]))
    assert (before["global_step"], after["global_step"]) == (5, 6)
    assert all(torch.equal(after["state_dict"][key], weight) for key, weight in before["state_dict"].items())
    assert expected["steps"][0] == 9
    assert any(not torch.equal(expected["weights"][key], weight) for key, weight in after["state_dict"].items())


def with_a_metric_of_its_own(old_logp, logp, advantages, mask):
    return -advantages * logp, {"surprise": -logp.detach()}


def test_the_metrics_of_a_loss_of_ones_own_survive_a_stop(tmp_path):
    class Published(SaveAt):
        def on_fit_start(self, trainer, module):
            self.rows, publish = [], module.publish
            module.publish = lambda stats, extra=None: (
                self.rows.append({k: float(v) for k, v in stats.compute().items()}) or publish(stats, extra)
            )

    arguments = {**SIZES, "policy_loss": with_a_metric_of_its_own}
    whole, rest = Published(6, tmp_path / "within.ckpt"), Published(0, None)
    fit_of(GSPO, arguments, ROLLOUTS, ACCUMULATE, callbacks=[whole])
    fit_of(GSPO, arguments, ROLLOUTS, ACCUMULATE, seed=1, callbacks=[rest], ckpt_path=tmp_path / "within.ckpt")
    assert whole.rows[1]["policy/surprise"] > 0
    assert rest.rows == whole.rows[1:]


def test_metrics_whose_names_came_later_are_in_the_checkpoint():
    module, other = (build(GSPO, policy_loss=with_a_metric_of_its_own) for _ in range(2))
    module.training_step(random_experience(model=module.models.policy))
    module.count({"mine/second": (2.0, None), "mine/first": (1.0, None)})
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert other.pop_metrics() == module.pop_metrics() != {}

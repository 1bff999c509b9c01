"""What the on-policy template offers beside the algorithms: metrics, losses of one's own, penalties, a hook."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.conservative_ppo import ConservativePPO
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce_pp import REINFORCEPlusPlus
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.ranks import mean_over_ranks, moments_over_ranks, whiten_over_ranks
from lit_rlhf.registry import get_adv_estimator, get_policy_loss
from lit_rlhf.types import SamplingConfig
from tests.algorithms.settings import rollout_from, rows_for, setting, take_stats
from tests.algorithms.toys import rollout_of
from tests.helpers import build, prompt_rows, prompts, trainer

SHORT = {"sampling": SamplingConfig(max_new_tokens=4), "group_size": 2}
NAN = float("nan")


# metrics


def test_a_losss_own_metrics_are_logged_under_policy_and_known_ones_under_stability():
    def loss(old_logp, logp, advantages, mask):
        per_row = torch.arange(6.0)
        known = {"clip_fraction": 0.25, "ratio_out_of_range": per_row}
        return -logp * advantages, {**known, "surprise": -logp, "temperature": 7, "note": "not a number"}

    module, batch = setting("GRPO", policy_loss=loss)
    module.training_step(batch)
    stats = take_stats(module)
    assert stats["policy/temperature"] == 7
    logprobs = module.score(batch).logprobs
    assert stats["policy/surprise"] == pytest.approx(float(-logprobs[batch.response_mask].mean()))
    assert stats["stability/clip_fraction"] == 0.25
    assert stats["stability/ratio_out_of_range"] == 2.5
    assert not any("note" in name for name in stats)
    module.training_step(batch)
    assert take_stats(module).keys() == stats.keys(), "a name is forgotten with the first rollout"


def test_pop_metrics_holds_what_was_counted_since_the_last_time():
    module, batch = setting("PPO")
    module.training_step(batch)
    first = module.pop_metrics()
    expected = {"policy_loss", "value_loss", "entropy_loss", "kl_loss", "approx_kl", "clip_fraction", "ratio_mean"}
    assert expected <= first.keys()
    assert all(isinstance(value, float) for value in first.values())
    assert module.pop_metrics() == {}
    module.training_step(batch)
    assert module.pop_metrics() == first


def test_the_value_loss_is_logged_without_its_coefficient():
    losses = []
    for coefficient in (0.5, 2.0):
        module, batch = setting("PPO", value_coef=coefficient)
        module.training_step(batch)
        losses.append(module.pop_metrics())
    assert losses[0]["value_loss"] == pytest.approx(losses[1]["value_loss"])
    assert losses[0]["loss"] + 1.5 * losses[0]["value_loss"] == pytest.approx(losses[1]["loss"])


def test_the_explained_variance_is_of_the_rollouts_values():
    """C14."""
    module = build(PPO, kl_coef=0, gae_lambda=1.0, value="shared")
    values = torch.tensor([[1.5], [2.0], [3.0], [3.5]]).double()
    module.experience(rollout_of([1.0, 2.0, 3.0, 4.0], [1] * 4, values=values))
    stats = module.pop_metrics()
    assert stats["explained_variance"] == pytest.approx(0.9)
    assert (stats["value_mean"], stats["return_mean"]) == (2.5, 2.5)
    module.experience(rollout_of([1.0, 1.0], [1] * 2, values=values[:2]))
    assert module.pop_metrics()["explained_variance"] == 0


def test_rows_that_are_alone_in_their_group_are_counted():
    def some(completion_ids, **kwargs):
        return [1.0, None, 0.0, 1.0, None, None]

    module = build(GRPO, reward_funcs=[some], **SHORT)
    experience = module.collect(prompts(3))
    stats = module.pop_metrics()
    assert stats["singleton_fraction"] == pytest.approx(1 / 6)
    assert (experience.advantages[0] == 0).all()
    assert (experience.advantages[2:4, 0] != 0).all()


# estimators and losses by their import path


def test_an_import_path_is_a_name():
    assert get_policy_loss("lit_rlhf.functional.clipped_policy_loss").__name__ == "clipped_policy_loss"
    assert get_adv_estimator("lit_rlhf.registry.estimators._rloo") is get_adv_estimator("rloo")
    with pytest.raises(InputError, match=r"policy loss: .*nothing"):
        build(GRPO, policy_loss="lit_rlhf.registry.nothing")
    with pytest.raises(InputError, match=r"advantage estimator: .*no_such_package"):
        build(GRPO, advantage_estimator="no_such_package.f")


def test_an_imported_loss_is_trained_with():
    imported, named = (setting("GRPO", policy_loss=loss) for loss in ("lit_rlhf.registry.losses._cispo", "cispo"))
    assert imported[0].training_step(imported[1]).item() == named[0].training_step(named[1]).item()


@pytest.mark.parametrize("wanted", ["values", "bootstrap", "baseline", "ref_logprobs", "gamma"])
def test_an_estimator_gets_what_it_names(wanted):
    seen = {}

    def estimator(rewards, mask, **kw):
        seen.update(kw)
        return rewards, None

    module = build(PPO, advantage_estimator=estimator, value="shared", whiten_advantages=False)
    rows = rows_for("", module.models.policy)
    module.compute_advantages(rows)
    expected = 1.0 if wanted == "gamma" else getattr(rows, wanted)
    assert seen[wanted] is expected or seen[wanted] == expected


def test_values_that_are_not_there_are_asked_for_in_a_sentence():
    with pytest.raises(InputError, match=r"algo.advantage_estimator=gae needs a value function"):
        build(GRPO, advantage_estimator="gae")
    with pytest.raises(InputError, match=r"algo.bootstrap_truncated needs a value function"):
        build(GRPO, bootstrap_truncated=True)


@pytest.mark.parametrize(
    ("algorithm", "arguments", "sentence"),
    [
        (PPO, {"gamma": 1.5}, "algo.gamma=1.5 and algo.gae_lambda=0.95 must be from 0 to 1"),
        (PPO, {"dual_clip": 1.0}, "algo.dual_clip must be above 1"),
        (PPO, {"value_clip": 0.0}, "algo.value_clip must be above 0"),
        (PPO, {"value_lr": 0.0}, "algo.value_lr must be above 0"),
        (PPO, {"value": "both"}, "algo.value"),
        (PPO, {"kl_in": "everywhere"}, "algo.kl_in"),
        (ConservativePPO, {"max_kl_divergence": 0.0}, "algo.max_kl_divergence must be above 0"),
        (ConservativePPO, {"penalty_kl": "k1"}, "algo.penalty_kl"),
        (ImportanceSampling, {"min_staleness": 4}, "algo.min_staleness=4 must be below algo.buffer_size=4"),
        (ImportanceSampling, {"clip_ratio": 0.5}, "algo.clip_ratio must be at least 1"),
        (RLOO, {"group_size": 1}, "algo.group_size=1"),
        (REINFORCEPlusPlus, {"group_size": 1, "group_baseline": True}, "algo.group_size=1"),
        (GRPO, {"entropy": "some"}, "algo.entropy"),
        (GRPO, {"importance_correction": "rows"}, "algo.importance_correction"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(algorithm, arguments, sentence):
    with pytest.raises(InputError) as caught:
        build(algorithm, **arguments)
    assert sentence in str(caught.value)


# rewards and masks


def test_a_penalty_is_taken_once_also_with_the_kl_in_the_reward():
    zeros = torch.zeros(2, 2).double()
    rollout = rollout_of([1.0, 1.0], [2, 2], truncated=torch.tensor([True, False]), ref_logprobs=zeros - 0.5)
    module = build(RLOO, kl_coef=0.1, truncation_penalty=0.25)
    found = module.shape_rewards(rollout)
    assert found.flatten().tolist() == pytest.approx([-0.05, 0.7, -0.05, 0.95], abs=1e-6)


def test_what_is_whitened_is_what_is_trained_on():
    """Completions that were cut off are left out where `mask_truncated` says so."""
    module, rows = setting("REINFORCE++", mask_truncated=True)
    experience = module.experience(module.score_rollout(rollout_from(rows)))
    kept = experience.response_mask
    assert (kept.any(1) == (~rows.truncated & rows.response_mask.any(1))).all()
    assert 0 < kept.sum() < rows.response_mask.sum()
    A = experience.advantages[kept]
    assert A.mean().item() == pytest.approx(0, abs=1e-9)
    assert A.std().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"group_baseline": True}])
@pytest.mark.parametrize("algorithm", [PPO, REINFORCEPlusPlus])
def test_a_completion_nobody_could_score_has_no_advantage_and_moves_no_others(algorithm, arguments):
    if algorithm is PPO and arguments:
        return
    module = build(algorithm, kl_coef=0, **arguments)
    nan, values = float("nan"), {} if algorithm is REINFORCEPlusPlus else {"values": torch.zeros(4, 2).double()}
    found = module.experience(rollout_of([5.0, 6.0, nan, 7.5], [2] * 4, group_ids=[0] * 4, **values)).advantages
    values = {name: x[:3] for name, x in values.items()}
    alone = module.experience(rollout_of([5.0, 6.0, 7.5], [2] * 3, group_ids=[0] * 3, **values)).advantages
    assert (found[2] == 0).all()
    torch.testing.assert_close(found[[0, 1, 3]], alone, atol=1e-9, rtol=0)
    assert alone.mean().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_the_scale_of_grpos_rewards(scale):
    module = build(GRPO, scale_rewards=scale)
    rewards = [1.0, 0.0, 5.0, 1.0]
    found = module.experience(rollout_of(rewards, [1] * 4, group_ids=[0, 0, 1, 1])).advantages[:, 0]
    group = [0.5, -0.5, 2.0, -2.0]
    by = {"std": [0.5**0.5, 0.5**0.5, 8**0.5, 8**0.5], "none": [1 - 1e-4] * 4, "batch": [(14.75 / 3) ** 0.5] * 4}[scale]
    assert found.tolist() == pytest.approx([A / (s + 1e-4) for A, s in zip(group, by, strict=True)], abs=1e-9)


# statistics over ranks, here of one


def test_moments_of_masked_cells():
    x = torch.tensor([[1.0, 2.0], [3.0, NAN]])
    mask = torch.tensor([[True, True], [True, False]])
    mean, var = moments_over_ranks(x, mask)
    assert (mean.item(), var.item()) == pytest.approx((2.0, 1.0))
    assert mean_over_ranks(x, mask).item() == 2.0
    whitened = whiten_over_ranks(x, mask)
    assert whitened.flatten().tolist() == pytest.approx([-1, 0, 1, 0], abs=1e-6)
    kept = whiten_over_ranks(x, mask, shift_mean=False)
    assert kept.flatten().tolist() == pytest.approx([1, 2, 3, 0], abs=1e-6)
    assert mean_over_ranks(x, torch.zeros_like(mask)).item() == 0
    assert moments_over_ranks(x, mask & (x == 1))[1].item() == 0
    far = 1e6 + torch.tensor([1.0, 2.0, 3.0]).double()
    assert moments_over_ranks(far, torch.ones(3).bool())[1].item() == pytest.approx(1.0, abs=1e-9)


# the hook before a step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("algorithm", [GRPO, DAPO])
def test_the_hook_sees_all_micro_batches_of_a_step_before_the_first_is_trained_on(algorithm, accumulate):
    events = []

    class Watched(algorithm):
        def begin_step(self, batches):
            events.append([batch.response_ids for batch in batches])

        def training_step(self, batch, batch_idx=0):
            events.append(batch.response_ids)
            return super().training_step(batch, batch_idx)

    module = build(Watched, prompts_per_rollout=4, minibatches=2, update_epochs=2, **SHORT)
    trainer(accumulate=accumulate).fit(module, datamodule=RowsDataModule(prompt_rows(16)))
    assert len(events) == 4 * (1 + accumulate)
    for i in range(0, len(events), 1 + accumulate):
        begun, *trained = events[i : i + 1 + accumulate]
        assert [ids.tolist() for ids in begun] == [ids.tolist() for ids in trained]


def test_rows_without_a_reference_add_no_kl():
    module, batch = setting("GRPO")
    terms = module.compute_loss(module.score(batch), replace(batch, ref_logprobs=None))
    assert list(terms) == ["policy_loss", "entropy_loss"]

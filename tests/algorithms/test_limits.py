"""Where algorithms meet, what scale does, and what stays within bounds (C29 to C32)."""

import math
from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.cispo import CISPO
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.dr_grpo import DrGRPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.reinforce_pp import REINFORCEPlusPlus
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.types import SamplingConfig
from tests.algorithms.settings import (
    AGGREGATIONS,
    ON_POLICY,
    loss_gradients_stats,
    on_policy_rows,
    rollout_from,
    setting,
)
from tests.helpers import VOCABULARY, assert_gradients_equal, build, gradients, plain_logprobs, random_experience

WITHOUT_TERMS = {
    PPO: {"kl_coef": 0, "value": "none", "advantage_estimator": "rewards_to_go"},
    REINFORCEPlusPlus: {"kl_coef": 0},
    RLOO: {"kl_coef": 0},
}
ALL = [GRPO, DAPO, DrGRPO, PPO, GSPO, CISPO, RLOO, REINFORCE, REINFORCEPlusPlus, ReMax, ImportanceSampling]
RATIOS = ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "ratio_out_of_range", "clipped_fraction")


def plain(algorithm, **arguments):
    return build(algorithm, **{**WITHOUT_TERMS.get(algorithm, {}), **arguments})


def with_one_advantage_per_row(batch):
    return replace(batch, advantages=batch.advantages[:, :1].expand_as(batch.advantages).clone())


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
def test_on_policy_the_algorithms_agree_and_follow_reinforce(loss_agg):
    found = {}
    for algorithm in ALL:
        module = plain(algorithm, loss_agg=loss_agg)
        batch = with_one_advantage_per_row(on_policy_rows(module))
        batch = replace(batch, behavior_logprobs=batch.old_logprobs)
        _, found[algorithm], stats = loss_gradients_stats(module, batch)
        assert stats["stability/approx_kl"] == pytest.approx(0, abs=1e-12)
        assert stats["stability/ratio_mean"] == pytest.approx(1, abs=1e-9)
        assert all(stats.get(f"stability/{name}", 0) == 0 for name in RATIOS)

    logprobs = module.models.score(batch).logprobs  # REINFORCE: -agg(A lp), with no ratio
    per_token = -batch.advantages * logprobs
    lengths = batch.response_mask.sum(1)
    rows = torch.stack([row[: int(n)].sum() for row, n in zip(per_token, lengths, strict=True)])
    reinforce = {
        "token-mean": rows.sum() / lengths.sum(),
        "seq-mean-token-mean": (rows / lengths).mean(),
        "seq-mean-token-sum": rows.mean(),
        "seq-mean-token-sum-norm": rows.mean() / 64,
    }[loss_agg]
    expected = gradients(module, reinforce)
    for algorithm in ALL:
        if algorithm is not GSPO or loss_agg == "seq-mean-token-mean":
            assert_gradients_equal(found[algorithm], expected, atol=1e-9)


@pytest.mark.parametrize("policy_loss", ["gspo", "gspo_token"])
def test_gspo_token_is_gspo_where_a_row_has_one_advantage(policy_loss):
    module, batch = setting("GSPO", policy_loss=policy_loss)
    found = loss_gradients_stats(module, with_one_advantage_per_row(batch))
    expected = loss_gradients_stats(setting("GSPO")[0], with_one_advantage_per_row(batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-12)
    assert_gradients_equal(found[1], expected[1])


def test_with_tokens_of_their_own_advantage_gspo_token_is_another_loss():
    found = [loss_gradients_stats(*setting(name))[1] for name in ("GSPO", "GSPO-token")]
    with pytest.raises(AssertionError):
        assert_gradients_equal(*found)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "sequence_clip"])
def test_of_one_token_the_sequences_ratio_is_the_tokens(name):
    wide = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "loss_agg": "seq-mean-token-mean"}
    modules = [build(GSPO, policy_loss=loss, **wide) for loss in (name, "clip")]
    batch = random_experience((1, 1, 1, 0, 1, 1), model=modules[0].models.policy)
    found, expected = (loss_gradients_stats(module, batch) for module in modules)
    assert found[0] == pytest.approx(expected[0], abs=1e-12)
    assert_gradients_equal(found[1], expected[1])
    assert found[2]["stability/clip_fraction"] == expected[2]["stability/clip_fraction"] > 0


CLIP = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "loss_agg": "token-mean"}


@pytest.mark.parametrize("algorithm", [DAPO, PPO, REINFORCEPlusPlus, DrGRPO])
def test_with_equal_clip_ratios_and_aggregation_the_clip_is_one(algorithm):
    modules = [plain(kind, **CLIP) for kind in (algorithm, GRPO)]
    batch = random_experience(model=modules[0].models.policy)
    found, expected = (loss_gradients_stats(module, batch) for module in modules)
    assert found[0] == expected[0]
    assert_gradients_equal(found[1], expected[1], atol=1e-12)
    assert found[2]["stability/clip_fraction"] > 0


def test_the_high_clip_ratio_is_dapos():
    loss, _, _ = loss_gradients_stats(*setting("DAPO"))
    other, _, _ = loss_gradients_stats(*setting("DAPO", clip_ratio_high=0.2))
    assert abs(loss - other) > 1e-4


@pytest.mark.parametrize("algorithm", [GRPO, DAPO, PPO, REINFORCEPlusPlus])
def test_without_a_clip_the_loss_is_minus_ratio_times_advantage(algorithm):
    module = plain(algorithm, clip_ratio_low=1e9, clip_ratio_high=1e9, loss_agg="token-mean")
    batch = random_experience(model=module.models.policy)
    ratio = (plain_logprobs(module.models.policy, batch) - batch.old_logprobs).exp()
    expected = -(ratio * batch.advantages)[batch.response_mask].mean()
    assert module.training_step(batch).item() == pytest.approx(float(expected), abs=1e-9)


def test_grpo_without_a_scale_and_with_a_constant_length_is_dr_grpo():
    sampling = {"sampling": SamplingConfig(max_new_tokens=10)}
    grpo = build(GRPO, scale_rewards="none", loss_agg="seq-mean-token-sum-norm", **sampling)
    found = []
    for module in (grpo, build(DrGRPO, **sampling)):
        batch = on_policy_rows(module)
        batch = replace(batch, advantages=module.compute_advantages(batch)[0])
        found.append(loss_gradients_stats(module, batch))
    R, lengths = batch.rewards.view(3, 2), batch.lengths.view(3, 2)
    expected = -float(((R - R.mean(1, keepdim=True)) * lengths).sum()) / 10 / 6
    assert abs(expected) > 1e-3
    assert found[0][0] == pytest.approx(expected, abs=1e-9)
    assert found[1][0] == pytest.approx(expected, abs=1e-9)
    assert_gradients_equal(found[1][1], found[0][1], atol=1e-12)


# C31: scale and shift of the rewards

ANY_SCALE = ("GRPO", "DAPO", "GSPO", "CISPO", "REINFORCE++", "REINFORCE++ baseline")
ANY_SHIFT = ("GRPO", "DAPO", "GSPO", "CISPO", "DrGRPO", "RLOO", "REINFORCE++", "REINFORCE++ baseline")
ANY_SHIFT += ("ImportanceSampling",)


def advantages_of(name, change):
    module, rows = setting(name, kl_in="reward", kl_coef=0)
    return module.experience(replace(rollout_from(rows), rewards=change(rows.rewards), ref_logprobs=None)).advantages


@pytest.mark.parametrize("name", ANY_SHIFT)
def test_a_constant_added_to_the_rewards_changes_nothing(name):
    expected = advantages_of(name, lambda R: R)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(advantages_of(name, lambda R: R + 5), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["GRPO", "DrGRPO", "RLOO", "REINFORCE", "REINFORCE++", "ImportanceSampling"])
def test_the_advantages_follow_the_scale_of_the_rewards_unless_they_are_divided_by_it(name):
    expected, tripled, negative = (advantages_of(name, lambda R, c=c: c * R) for c in (1, 3, -1))
    if name in ANY_SCALE:
        torch.testing.assert_close(tripled, expected, atol=1e-2, rtol=1e-3)  # up to eps = 1e-4
    else:
        torch.testing.assert_close(tripled, 3 * expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(negative, -expected, atol=1e-12, rtol=0)


# C32: bounds


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_at_the_reference_the_kl_is_zero_and_does_not_push(estimator):
    module = build(GRPO, kl_coef=1.0, kl_estimator=estimator)
    batch = on_policy_rows(module)
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    loss, found, stats = loss_gradients_stats(module, batch)
    assert loss == pytest.approx(0, abs=1e-12)
    assert stats["stability/kl_divergence"] == pytest.approx(0, abs=1e-12)
    assert max(float(gradient.abs().max()) for gradient in found.values()) < 1e-9


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_minimising_the_kl_alone_brings_the_policy_back(estimator):
    module, batch = setting("GRPO full KL", kl_coef=1.0, kl_estimator=estimator, entropy_coef=0)
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    divergence = []
    optimizer = torch.optim.SGD(module.models.policy.parameters(), lr=0.01)
    for _ in range(5):
        loss, _, stats = loss_gradients_stats(module, batch)
        divergence.append(stats["stability/kl_divergence"])
        assert loss > 0
        optimizer.step()
    assert divergence[-1] < 0.9 * divergence[0]


def test_the_entropy_bonus_raises_the_entropy():
    module, entropies = build(GRPO, entropy_coef=1.0), []
    batch = on_policy_rows(module)
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    optimizer = torch.optim.SGD(module.models.policy.parameters(), lr=0.1)
    for _ in range(3):
        _, _, stats = loss_gradients_stats(module, batch)
        entropies.append(stats["stability/entropy"])
        optimizer.step()
    assert 0 <= entropies[0] < entropies[1] < entropies[2] <= math.log(VOCABULARY)


@pytest.mark.parametrize("name", ON_POLICY)
def test_shares_lie_between_nothing_and_all(name):
    module, batch = setting(name)
    module.training_step(batch)
    stats = {key.split("/")[1]: float(value) for key, value in module.stats.compute().items()}
    for share in (*RATIOS, "value_clip_fraction", "ess"):
        assert 0 <= stats.get(share, 0.5) <= 1, share
    assert stats["approx_kl"] > 0
    assert stats.get("kl_divergence", 0) >= 0
    assert 0 < stats["entropy"] < math.log(VOCABULARY)
    assert stats["ratio_min"] < stats["ratio_mean"] < stats["ratio_max"]


@pytest.mark.parametrize("name", ["PPO", "ConservativePPO", "REINFORCE++", "REINFORCE++ baseline"])
def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens(name):
    module, rows = setting(name, truncation_penalty=0.3)
    experience = module.experience(module.score_rollout(rollout_from(rows)))
    tokens = experience.advantages[experience.response_mask]
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-9)
    assert float(tokens.var()) == pytest.approx(1, abs=1e-6)
    returns = experience.returns[experience.response_mask]
    assert abs(float(returns.mean())) > 1e-3
    assert float(returns.var()) != pytest.approx(1, abs=1e-2)

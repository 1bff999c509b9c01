"""Worked numbers (C1 to C24) through the modules: rewards, advantages, weights and losses of a few tokens."""

import math

import pytest
import torch

from lit_rlhf.algorithms.cispo import CISPO
from lit_rlhf.algorithms.conservative_ppo import ConservativePPO
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
from tests.algorithms.toys import loss_of, rollout_of
from tests.helpers import build, plain_logprobs, prompts, random_experience, tiny_model


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def experienced(algorithm, rollout, **arguments):
    """The experience that a fresh module makes of a rollout."""
    return build(algorithm, **{"kl_coef": 0, **arguments}).experience(rollout)


V = double([0.5, 0.6, 0.7])
BY_HAND = {"whiten_advantages": False, "gamma": 0.9, "gae_lambda": 0.8, "value": "shared"}


@pytest.mark.filterwarnings("ignore:algo.gamma")
class TestGeneralisedAdvantages:
    """C1."""

    @pytest.mark.parametrize("algorithm", [PPO, ConservativePPO])
    def test_terminal(self, algorithm):
        found = experienced(algorithm, rollout_of([1], [3], values=V), **BY_HAND)
        assert found.advantages[0].tolist() == pytest.approx([0.21712, 0.246, 0.3], abs=1e-12)
        assert found.returns[0].tolist() == pytest.approx([0.71712, 0.846, 1], abs=1e-12)

    def test_truncated_and_bootstrapped(self):
        found = experienced(PPO, rollout_of([1], [3], values=V, bootstrap=double(0.8)), **BY_HAND)
        assert found.advantages[0].tolist() == pytest.approx([0.590368, 0.7644, 1.02], abs=1e-12)

    def test_whitened_advantages_and_plain_returns(self):
        found = experienced(PPO, rollout_of([1], [3], values=V), **{**BY_HAND, "whiten_advantages": True})
        assert found.advantages[0].tolist() == pytest.approx([-0.8855, -0.1990, 1.0845], abs=1e-4)
        assert found.returns[0].tolist() == pytest.approx([0.71712, 0.846, 1], abs=1e-12)

    def test_a_hole_is_stepped_over(self):
        mask = torch.tensor([[True, False, True]])
        rollout = rollout_of([1], [3], response_mask=mask, values=double([0.5, 9, 0.7]))
        assert experienced(PPO, rollout, **BY_HAND).advantages[0].tolist() == pytest.approx([0.346, 0, 0.3], abs=1e-12)

    def test_undiscounted_with_a_kl_in_the_reward(self):
        old, ref = double([-1, -1, -1]), double([-1.5, -1.2, -1])
        rollout = rollout_of([1], [3], logprobs=old, ref_logprobs=ref, values=V)
        found = experienced(PPO, rollout, kl_coef=0.1, whiten_advantages=False, gae_lambda=1.0)
        assert found.advantages[0].tolist() == pytest.approx([0.43, 0.38, 0.3], abs=1e-12)

    def test_the_defaults_are_gamma_1_and_lambda_095(self):
        found = experienced(PPO, rollout_of([1], [3], values=V), whiten_advantages=False, value="shared")
        assert found.advantages[0].tolist() == pytest.approx([0.1 + 0.95 * (0.1 + 0.95 * 0.3), 0.385, 0.3], abs=1e-12)


class TestBootstrap:
    """What follows a completion that was cut off: the value of its last token, read from the model."""

    @pytest.mark.parametrize("value", ["shared", "separate"])
    @pytest.mark.parametrize("bootstraps", [True, False])
    def test_only_rows_that_were_cut_off_and_only_when_asked(self, bootstraps, value):
        module = build(
            PPO, value=value, bootstrap_truncated=bootstraps, kl_coef=0, sampling=SamplingConfig(max_new_tokens=4)
        )
        with torch.no_grad():
            module.models.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        module.engine.end_token_ids = list(range(1, 20))
        experience = module.collect(prompts(6))
        assert 0 < experience.truncated.sum() < len(experience)
        cells = zip(
            *(getattr(experience, x) for x in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")),
            strict=True,
        )
        trunk, head = module.models.policy.base_model, module.models.value_head
        ends = [trunk(torch.cat([p[m], r[n]])[None]).last_hidden_state[0, -1] for p, m, r, n in cells]
        last = torch.stack(ends).detach() @ head.weight.detach()
        expected = torch.where(experience.truncated & bootstraps, last, 0.0)
        torch.testing.assert_close(experience.bootstrap, expected, atol=1e-9, rtol=0)
        end = experience.lengths - 1
        rest = experience.returns.gather(1, end[:, None])[:, 0]  # of the last token: R, and what comes after
        torch.testing.assert_close(rest, experience.raw_rewards + expected, atol=1e-9, rtol=0)


KL = {"logprobs": double([-1, -2]), "ref_logprobs": double([-1.5, -1.5])}


class TestRewards:
    """C2, C21."""

    def test_the_kl_is_taken_off_every_token_and_the_score_given_to_the_last(self):
        rewards = experienced(REINFORCE, rollout_of([2], [2], **KL), kl_coef=0.1).rewards
        assert rewards[0].tolist() == pytest.approx([-0.05, 2.05], abs=1e-12)
        returns = experienced(REINFORCE, rollout_of([2], [2], **KL), kl_coef=0.1).advantages
        assert returns[0].tolist() == pytest.approx([2.0, 2.05], abs=1e-12)

    @pytest.mark.parametrize(("estimator", "kl"), [("k2", [0.125, 0.125]), ("k3", [0.10653066, 0.14872127])])
    def test_other_estimators(self, estimator, kl):
        rewards = experienced(REINFORCE, rollout_of([2], [2], **KL), kl_coef=0.1, kl_estimator=estimator).rewards
        assert rewards[0].tolist() == pytest.approx([-0.1 * kl[0], 2 - 0.1 * kl[1]], abs=1e-8)

    def test_the_kl_is_of_the_policy_that_the_update_starts_from(self):
        """And not of the one that sampled, where they differ."""
        rollout = rollout_of([2], [2], behavior_logprobs=double([-9, -9]), **KL)
        rewards = experienced(REINFORCE, rollout, kl_coef=0.1).rewards
        assert rewards[0].tolist() == pytest.approx([-0.05, 2.05], abs=1e-12)

    def test_the_last_token_is_the_last_valid_one_and_not_the_last_column(self):
        nan = math.nan
        rollout = rollout_of([2], [2], logprobs=double([-1, -2, nan]), ref_logprobs=double([-1.5, -1.5, nan]), width=3)
        found = experienced(REINFORCE, rollout, kl_coef=0.1)
        assert found.rewards[0, :2].tolist() == pytest.approx([-0.05, 2.05], abs=1e-12)
        assert found.advantages[0].tolist() == pytest.approx([2.0, 2.05, 0], abs=1e-12)

    def test_rloo_subtracts_the_kl_of_the_sequence(self):
        old, ref = double([-1, -1], [-1, -1]), double([-1.3, -0.9], [-1.1, -1.3])
        rollout = rollout_of([1, 0], [2, 2], logprobs=old, ref_logprobs=ref)
        found = experienced(RLOO, rollout, kl_coef=0.05)
        assert found.rewards.sum(1).tolist() == pytest.approx([0.99, -0.02], abs=1e-12)
        assert found.advantages.flatten().tolist() == pytest.approx([1.01, 1.01, -1.01, -1.01], abs=1e-12)

    def test_remax_subtracts_the_greedy_reward(self):
        rollout = rollout_of([1, 0], [2, 1], baseline=double(0.4, 0.4))
        found = experienced(ReMax, rollout).advantages
        assert found.flatten().tolist() == pytest.approx([0.6, 0.6, -0.4, 0], abs=1e-12)

    def test_remax_with_a_kl_keeps_the_raw_greedy_reward(self):
        rollout = rollout_of([2], [2], baseline=double(0.4), **KL)
        found = experienced(ReMax, rollout, kl_coef=0.1)
        assert found.advantages[0].tolist() == pytest.approx([1.6, 1.65], abs=1e-12)

    def test_dapo_punishes_long_completions(self):
        rollout = rollout_of([1, 0, 1, 0, 1], [80, 90, 100, 81, 1])
        module = build(DAPO, sampling=SamplingConfig(max_new_tokens=100), overlong_buffer=20)
        assert module.shape_rewards(rollout).tolist() == pytest.approx([1, -0.5, 0, -0.05, 1], abs=1e-6)
        assert build(DAPO).shape_rewards(rollout).tolist() == [1, 0, 1, 0, 1]

    def test_the_penalty_is_part_of_the_advantage(self):
        """Both are right, one of them is too long."""
        sampling = SamplingConfig(max_new_tokens=100)
        found = experienced(DAPO, rollout_of([1, 1], [80, 100]), sampling=sampling, overlong_buffer=20).advantages
        assert found[:, 0].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-3)

    def test_a_completion_that_was_cut_off_pays_before_anything_is_compared(self):
        rollout = rollout_of([1, 1, 0], [2, 3, 1], truncated=torch.tensor([False, True, False]))
        found = experienced(DrGRPO, rollout, truncation_penalty=0.6)
        assert found.rewards.tolist() == pytest.approx([1, 0.4, 0], abs=1e-6)
        assert found.advantages[:, 0].tolist() == pytest.approx([1 - 1.4 / 3, 0.4 - 1.4 / 3, -1.4 / 3], abs=1e-6)
        assert found.raw_rewards.tolist() == [1, 1, 0]


class TestWhitening:
    """C24."""

    def test_reinforce_pp_whitens_the_returns_of_all_tokens(self):
        rollout = rollout_of(
            [2, -1], [2, 1], logprobs=double([-1, -2], [-1, 0]), ref_logprobs=double([-1.5, -1.5], [-1, 0])
        )
        found = experienced(REINFORCEPlusPlus, rollout, kl_coef=0.1)
        assert found.returns.flatten().tolist() == pytest.approx([2.0, 2.05, -1.0, 0], abs=1e-12)
        assert found.advantages.flatten().tolist() == pytest.approx([0.5630, 0.5916, -1.1546, 0], abs=1e-4)

    def test_the_variant_takes_the_groups_mean_off_first(self):
        rollout = rollout_of([1, 0, 1, 1], [1] * 4, group_ids=[0, 0, 1, 1])
        found = experienced(REINFORCEPlusPlus, rollout, group_baseline=True).advantages[:, 0]
        assert found.tolist() == pytest.approx([1.2247449, -1.2247449, 0, 0], abs=1e-6)

    def test_the_variant_divides_by_no_groups_deviation(self):
        rollout = rollout_of([1, 0, 5, 1], [1] * 4, group_ids=[0, 0, 1, 1])
        found = experienced(REINFORCEPlusPlus, rollout, group_baseline=True).advantages[:, 0]
        deviation = math.sqrt((2 * 0.25 + 2 * 4) / 3)
        assert found.tolist() == pytest.approx([x / deviation for x in (0.5, -0.5, 2, -2)], abs=1e-6)

    def test_the_variant_has_its_kl_in_the_loss_by_k2(self):
        module = build(REINFORCEPlusPlus, group_baseline=True)
        assert (module.kl.in_loss, module.kl.in_reward, module.kl.loss_estimator) == (True, False, "k2")
        module = build(REINFORCEPlusPlus)
        assert (module.kl.in_loss, module.kl.in_reward, module.kl.reward_estimator) == (False, True, "k1")
        module = build(REINFORCEPlusPlus, group_baseline=True, kl_in="reward")
        assert (module.kl.in_loss, module.kl.in_reward, module.kl.reward_estimator) == (False, True, "k1")
        module = build(REINFORCEPlusPlus, group_baseline=True, kl_estimator="k3")
        assert (module.kl.in_loss, module.kl.loss_estimator) == (True, "k3")


class TestLosses:
    @pytest.mark.parametrize(
        ("algorithm", "arguments", "expected"),
        [
            (GRPO, {}, 0.0),
            (GRPO, {"loss_agg": "token-mean"}, -0.5),
            (DAPO, {}, -0.5),
            (DrGRPO, {}, -0.25),
            (GRPO, {"loss_agg": "seq-mean-token-sum-norm"}, -0.25),
            (GRPO, {"loss_agg": "seq-mean-token-sum"}, -1.0),
            (GSPO, {}, 0.0),
            (REINFORCEPlusPlus, {"kl_coef": 0}, -0.5),
        ],
    )
    def test_the_value_of_an_on_policy_loss(self, algorithm, arguments, expected):
        """C20."""
        module = build(algorithm, sampling=SamplingConfig(max_new_tokens=4), **arguments)
        logprobs = -torch.rand(2, 3, dtype=torch.float64)
        advantages = double([1.0] * 3, [-1.0] * 3)
        rollout = rollout_of([1, 0], [3, 1], logprobs=logprobs)
        assert loss_of(module, rollout, logprobs, advantages).item() == pytest.approx(expected, abs=1e-12)

    def test_cispo(self):
        """C9."""
        lp = double([-1, -2, -3]).requires_grad_()
        old = lp.detach() - double([0.5, 1, 3]).log()
        loss = loss_of(build(CISPO, clip_max=2.0), rollout_of([1], [3], logprobs=old), lp, torch.ones_like(lp))
        assert loss.item() == pytest.approx(2.8333333, abs=1e-7)
        assert torch.autograd.grad(loss, lp)[0][0].tolist() == pytest.approx([-1 / 6, -1 / 3, -2 / 3], abs=1e-7)

    @pytest.mark.parametrize("policy_loss", ["gspo", "gspo_token"])
    def test_gspo(self, policy_loss):
        """C8."""
        for A, high, expected, slope in (
            (1.0, 9.0, -1.1051709, -0.3683903),
            (1.0, 4e-4, -1.0004, 0),
            (-1.0, 4e-4, 1.1051709, 0.3683903),
        ):
            module = build(GSPO, policy_loss=policy_loss, clip_ratio_high=high)
            lp = double([0.1, -0.1, 0.3]).requires_grad_()
            loss = loss_of(module, rollout_of([1], [3]), lp, torch.full_like(lp, A))
            assert loss.item() == pytest.approx(expected, abs=1e-7)
            assert torch.autograd.grad(loss, lp)[0][0].tolist() == pytest.approx([slope] * 3, abs=1e-7)

    def test_the_four_terms_of_ppo(self):
        """C18: -.2 + .5 * .32 - .01 * .5 + .01 * .02."""
        terms = {"kl_in": "loss", "kl_coef": 0.01, "entropy_coef": 0.01, "kl_estimator": "k2", "value_clip": 0.2}
        module = build(PPO, clip_ratio_high=9.0, **terms)
        old = double([0.0])
        lp = old + math.log(0.2)
        rollout = rollout_of([1], [1], logprobs=old, ref_logprobs=lp - 0.2, values=double([0.0]))
        values = double([1.0]).requires_grad_()
        loss = loss_of(module, rollout, lp, torch.ones(1, 1).double(), entropy=double([0.5]), values=values)
        assert loss.item() == pytest.approx(-0.0448, abs=1e-12)
        assert torch.autograd.grad(loss, values)[0].item() == 0

    @pytest.mark.parametrize(("value", "loss", "slope"), [(1.0, 0.32, 0), (0.1, 0.405, -0.9)])
    def test_the_value_clip(self, value, loss, slope):
        """C18; the maximum is each element's own."""
        module = build(PPO, kl_coef=0, value_coef=1.0)
        values = double([value, 1.0]).requires_grad_()
        rollout = rollout_of([1], [2], values=double([0.0, 0.0]))
        zeros = torch.zeros(1, 2).double()
        module.gae_lambda = 1.0  # the returns are R = 1 at both tokens
        found = loss_of(module, rollout, zeros, zeros, values=values)
        assert found.item() == pytest.approx((loss + 0.32) / 2, abs=1e-12)
        assert torch.autograd.grad(found, values)[0][0].tolist() == pytest.approx([slope / 2, 0], abs=1e-12)

    def test_the_entropy_term_has_the_gradient_of_the_entropy(self):
        """C13: dH/dz = -p (log p + H) at logits [2, 1, 0]; the bonus is subtracted."""
        module = build(GRPO, entropy_coef=0.5)
        logits = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
        log_p = logits.log_softmax(0)
        entropy = -(log_p.exp() * log_p).sum().view(1, 1)
        zeros = torch.zeros(1, 1, dtype=torch.float64)
        loss = loss_of(module, rollout_of([0], [1]), zeros, zeros, entropy=entropy)
        assert loss.item() == pytest.approx(-0.5 * 0.8323956, abs=1e-6)
        found = torch.autograd.grad(loss, logits)[0] / -0.5
        assert found.tolist() == pytest.approx([-0.28259, 0.14077, 0.14182], abs=1e-5)


def test_the_defaults_are_the_papers():
    by_class = {
        "seq-mean-token-mean": [GRPO, GSPO],
        "token-mean": [DAPO, PPO, ConservativePPO, CISPO, REINFORCEPlusPlus, ImportanceSampling],
        "seq-mean-token-sum-norm": [DrGRPO, RLOO, REINFORCE, ReMax],
    }
    for loss_agg, algorithms in by_class.items():
        assert {build(algorithm).loss_agg for algorithm in algorithms} == {loss_agg}
    assert (build(GSPO).clip_ratio_low, build(GSPO).clip_ratio_high) == (3e-4, 4e-4)
    assert (build(PPO).kl_coef, build(RLOO).kl_coef, build(REINFORCEPlusPlus).kl_coef) == (0.05, 0.05, 0.01)
    assert all(build(a).models.reference is None for a in (GRPO, DrGRPO, DAPO, GSPO, CISPO, REINFORCE, ReMax))
    module = build(PPO)
    assert (module.critic.coef, module.critic.clip, module.gae_lambda, module.gamma) == (0.5, 0.2, 0.95, 1.0)


def test_the_tiny_models_of_these_tests_are_not_flat():
    logprobs = plain_logprobs(tiny_model().double(), random_experience())
    assert logprobs[logprobs != 0].std() > 0.1

"""Expected gradients of the algorithms as they are, over every outcome of toy problems (C22, C23)."""

import statistics

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
from lit_rlhf.registry import get_policy_loss
from lit_rlhf.types import SamplingConfig
from tests.algorithms.toys import (
    BEHAVIOR,
    KL_GRADIENT,
    THETA,
    TRUE_GRADIENT,
    bandit_by_hand,
    bandit_gradient,
    toy_by_hand,
    toy_gradient,
)
from tests.helpers import build

WIDE = {"clip_ratio_low": 1e9, "clip_ratio_high": 1e9}
SUMS = {"loss_agg": "seq-mean-token-sum"}


def made(algorithm, steps=1, **arguments):
    return build(algorithm, sampling=SamplingConfig(max_new_tokens=steps), **{"kl_coef": 0, **arguments})


def reward_of_the_row(rewards, mask):
    """REINFORCE without a baseline."""
    return torch.where(mask, rewards.unsqueeze(1), 0.0), None


class StartedREINFORCE(REINFORCE):
    """With a baseline of 0.7 from earlier rollouts."""

    @property
    def baseline(self):
        return 0.7


# C22: the gradient of the bandit's J is [1/6, -1/6, 0]


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize(
    ("algorithm", "arguments", "fields"),
    [
        (RLOO, {}, {}),
        (RLOO, {"policy_loss": "sequence_clip", "loss_agg": "seq-mean-token-mean"}, {}),
        (REINFORCE, {}, {}),
        (StartedREINFORCE, {}, {}),
        (ReMax, {}, {"baseline": 0.4}),
        (PPO, {"value": "shared", "whiten_advantages": False, "gae_lambda": 1.0}, {"values": 0.4}),
        (GRPO, {"advantage_estimator": "rloo"}, {}),
        (DAPO, {"advantage_estimator": "rloo"}, {}),
    ],
)
def test_unbiased_algorithms_follow_the_objective_of_a_bandit(algorithm, arguments, fields, group_size):
    found = bandit_gradient(made(algorithm, **arguments), group_size, **fields)
    assert found == pytest.approx([1 / 6, -1 / 6, 0], abs=1e-12)


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("algorithm", [DrGRPO, ImportanceSampling])
def test_the_groups_own_mean_shrinks_the_gradient_of_a_bandit(algorithm, group_size):
    exact = (group_size - 1) / group_size / 6
    assert bandit_gradient(made(algorithm), group_size) == pytest.approx([exact, -exact, 0], abs=1e-12)


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("algorithm", [GRPO, DAPO, GSPO, CISPO])
def test_the_standard_deviation_makes_another_gradient_of_a_bandit(algorithm, group_size):
    first = {2: 0.1571348, 3: 0.2451408}[group_size]
    found = bandit_gradient(made(algorithm), group_size)
    assert found == pytest.approx([first, -first, 0], abs=1e-4)  # the oracle has eps = 0


@pytest.mark.parametrize("arguments", [{}, {"group_baseline": True}])
def test_reinforce_pp_whitens_a_bandits_rewards(arguments):
    def whitened(rewards):
        mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
        return [(r - mean) / deviation if deviation else 0.0 for r in rewards]

    found = bandit_gradient(made(REINFORCEPlusPlus, **arguments), 3)
    assert found == pytest.approx(bandit_by_hand(whitened, 3), abs=1e-6)
    assert abs(found[0]) > 0.2


# C23: two steps


@pytest.mark.parametrize(
    ("algorithm", "arguments", "rows", "fields", "scale"),
    [
        (RLOO, {}, 2, {}, 1 / 2),
        (RLOO, SUMS, 2, {}, 1),
        (RLOO, SUMS, 3, {}, 1),
        (RLOO, {"policy_loss": "sequence_clip", "loss_agg": "seq-mean-token-mean"}, 2, {}, 1),
        (REINFORCE, {}, 1, {}, 1 / 2),
        (REINFORCE, SUMS, 2, {}, 1),
        (StartedREINFORCE, SUMS, 1, {}, 1),
        (ReMax, {}, 1, {"baseline": lambda n: torch.full((n,), 0.2).double()}, 1 / 2),
        (ReMax, SUMS, 2, {"baseline": lambda n: torch.full((n,), 0.2).double()}, 1),
        (DrGRPO, {}, 2, {}, 1 / 4),
        (DrGRPO, {}, 3, {}, 1 / 3),
        (ImportanceSampling, SUMS, 2, {}, 1 / 2),
    ],
)
def test_sums_over_tokens_follow_the_objective(algorithm, arguments, rows, fields, scale):
    found = toy_gradient(made(algorithm, steps=2, **arguments), rows, **fields)
    assert found == pytest.approx([scale * x for x in TRUE_GRADIENT], abs=1e-6)


def test_generalised_advantages_follow_the_objective_for_any_values():
    module = made(PPO, steps=2, value="shared", whiten_advantages=False, gae_lambda=1.0, **SUMS)
    values = lambda n: torch.tensor([[0.3, -0.8]] * n, dtype=torch.float64)  # noqa: E731
    assert toy_gradient(module, values=values) == pytest.approx(TRUE_GRADIENT, abs=1e-6)


@pytest.mark.parametrize("algorithm", [GRPO, DAPO, REINFORCE])
@pytest.mark.parametrize(
    ("loss_agg", "rows", "expected"),
    [
        ("seq-mean-token-sum", 1, TRUE_GRADIENT),
        ("seq-mean-token-sum", 2, TRUE_GRADIENT),
        ("seq-mean-token-sum-norm", 1, [x / 2 for x in TRUE_GRADIENT]),
        ("seq-mean-token-mean", 1, [0.003070, 0.073177]),
        ("token-mean", 2, [0.019498, 0.082966]),
    ],
)
def test_which_aggregations_follow_the_objective(algorithm, loss_agg, rows, expected):
    module = made(algorithm, steps=2, advantage_estimator=reward_of_the_row, loss_agg=loss_agg)
    assert toy_gradient(module, rows) == pytest.approx(expected, abs=1e-6)


def test_grpo_and_reinforce_pp_are_what_they_are():
    def normalised(rewards, lengths):
        spread = statistics.stdev(rewards) + 1e-4
        return [[(r - statistics.mean(rewards)) / spread] * 2 for r in rewards]

    def whitened(rewards, lengths):
        tokens = [r for r, n in zip(rewards, lengths, strict=True) for _ in range(n)]
        spread = (statistics.variance(tokens) + 1e-8) ** 0.5
        return [[(r - statistics.mean(tokens)) / spread] * 2 for r in rewards]

    grpo = toy_by_hand(normalised, 2, lambda lengths, i: 1 / 2 / lengths[i])
    assert toy_gradient(made(GRPO), 2) == pytest.approx(grpo, abs=1e-9)
    assert toy_gradient(made(GSPO), 2) == pytest.approx(grpo, abs=1e-9)
    tokens = lambda lengths, i: 1 / sum(lengths)  # noqa: E731
    assert toy_gradient(made(CISPO), 2) == pytest.approx(toy_by_hand(normalised, 2, tokens), abs=1e-9)
    assert toy_gradient(made(REINFORCEPlusPlus), 2) == pytest.approx(toy_by_hand(whitened, 2, tokens), abs=1e-9)


# samples of another policy


EXACT = {"importance_clip_min": 0.0, "importance_clip_max": 1e9, "staleness_decay": 1.0, **SUMS}
WITHOUT, BY_TOKEN = [0.046616, 0.160965], [0.101500, 0.110047]


@pytest.mark.parametrize(("level", "expected"), [("none", WITHOUT), ("token", BY_TOKEN), ("sequence", TRUE_GRADIENT)])
@pytest.mark.parametrize("algorithm", [ImportanceSampling, REINFORCE, ReMax])
def test_importance_sampling_corrects_the_score_function(algorithm, level, expected):
    module = made(algorithm, importance_correction=level, advantage_estimator=reward_of_the_row, **EXACT)
    zero = {"baseline": lambda n: torch.zeros(n).double()} if algorithm is ReMax else {}
    assert toy_gradient(module, behavior=BEHAVIOR, **zero) == pytest.approx(expected, abs=1e-6)


def test_by_sequence_the_batchs_mean_only_shrinks_the_gradient():
    module = made(ImportanceSampling, importance_correction="sequence", **EXACT)
    found = toy_gradient(module, rows=2, behavior=BEHAVIOR)
    assert found == pytest.approx([x / 2 for x in TRUE_GRADIENT], abs=1e-6)


@pytest.mark.parametrize("old", [BEHAVIOR, THETA, [0.6, 0.1]])
def test_a_ratio_to_any_proximal_policy_is_corrected_once(old):
    """pi_old / pi_b outside times pi / pi_old inside is pi / pi_b, whatever pi_old is."""
    shared = {"advantage_estimator": reward_of_the_row, **EXACT}
    module = made(GRPO, importance_correction="token", **WIDE, **shared)
    assert toy_gradient(module, behavior=BEHAVIOR, old=old) == pytest.approx(BY_TOKEN, abs=1e-6)
    shared["loss_agg"] = "seq-mean-token-mean"
    module = made(RLOO, importance_correction="sequence", policy_loss=_unclipped_sequence, **shared)
    assert toy_gradient(module, behavior=BEHAVIOR, old=old) == pytest.approx(TRUE_GRADIENT, abs=1e-6)


def _unclipped_sequence(old_logp, logp, advantages, mask):
    return get_policy_loss("sequence_clip")(old_logp, logp, advantages, mask, 1e9, 1e9)


# the KL to the reference


@pytest.mark.parametrize("algorithm", [RLOO, REINFORCE, ReMax])
@pytest.mark.parametrize("rows", [1, 2])
def test_in_the_reward_the_kl_is_that_of_the_sequence(algorithm, rows):
    rows = 2 if algorithm is RLOO else rows
    zero = {"baseline": lambda n: torch.zeros(n).double()} if algorithm is ReMax else {}
    module = made(algorithm, kl_coef=1.0, kl_in="reward", **SUMS)
    found = toy_gradient(module, rows, rewards=0.0, **zero)
    assert found == pytest.approx([-x for x in KL_GRADIENT], abs=1e-6)


def test_in_the_reward_of_ppo_the_kl_is_that_of_the_sequence():
    module = made(PPO, kl_coef=1.0, value="shared", whiten_advantages=False, gae_lambda=1.0, **SUMS)
    values = lambda n: torch.tensor([[0.3, -0.8]] * n, dtype=torch.float64)  # noqa: E731
    found = toy_gradient(module, rewards=0.0, values=values)
    assert found == pytest.approx([-x for x in KL_GRADIENT], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kl_estimator": "k1"}, [0, 0]),
        ({"kl_estimator": "k2"}, [0.072078, -0.058542]),
        ({"kl_estimator": "k3"}, [0.073708, -0.059523]),
        ({}, [0.073708, -0.059523]),
        ({"kl_estimator": "k1", "kl_unbiased": True}, [0.072078, -0.058542]),
        ({"kl_unbiased": True}, [0.072078, -0.058542]),
        ({"kl_estimator": "full"}, [0.072078, -0.058542]),
    ],
)
@pytest.mark.parametrize("algorithm", [GRPO, RLOO])
@pytest.mark.filterwarnings("ignore:algo.kl_estimator=k1")
def test_in_the_loss_the_kl_holds_the_states_fixed(algorithm, arguments, expected):
    nothing = lambda rewards, mask: (torch.zeros(mask.shape, dtype=torch.float64), None)  # noqa: E731
    module = made(algorithm, kl_coef=1.0, kl_in="loss", advantage_estimator=nothing, **SUMS, **arguments)
    assert toy_gradient(module) == pytest.approx([-x for x in expected], abs=1e-6)  # -dL lowers it


def test_in_both_places_the_two_gradients_add_up():
    module = made(REINFORCE, kl_coef=1.0, kl_in="both", **SUMS)
    expected = [-x - y for x, y in zip(KL_GRADIENT, [0.073708, -0.059523], strict=True)]
    assert toy_gradient(module, rewards=0.0) == pytest.approx(expected, abs=1e-6)

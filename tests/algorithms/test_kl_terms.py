"""The KL in the loss: which policy an unbiased estimate starts from, and which coefficient is logged."""

import math
from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.types import SamplingConfig
from tests.algorithms.settings import rows_for, take_stats
from tests.algorithms.toys import BEHAVIOR, THETA, rollout_of, toy_gradient
from tests.helpers import assert_gradients_equal, build, gradients

UNBIASED = {"kl_coef": 1.0, "kl_in": "loss", "kl_unbiased": True}
EXACT = {"importance_clip_min": 0.0, "importance_clip_max": 1e9, "staleness_decay": 1.0}
KL_OF_STEPS = [0.072078, -0.058542]  # the gradient of each step's KL, of states that the policy itself visits


def no_advantage(rewards, mask):
    return torch.zeros(mask.shape, dtype=torch.float64), None


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("algorithm", [ImportanceSampling, REINFORCE, ReMax])
def test_beside_a_loss_without_a_ratio_an_unbiased_kl_does_not_depend_on_pi_old(algorithm, level):
    """By sequence the samples stand for the policy's own; by token the states stay the behaviour's."""
    module = build(
        algorithm,
        sampling=SamplingConfig(max_new_tokens=2),
        advantage_estimator=no_advantage,
        importance_correction=level,
        loss_agg="seq-mean-token-sum",
        **UNBIASED,
        **EXACT,
    )
    reached = [1 / (1 + math.exp(-policy[0])) for policy in (BEHAVIOR, THETA)]
    second = KL_OF_STEPS[1] * (reached[0] / reached[1] if level == "token" else 1)
    expected = pytest.approx([-KL_OF_STEPS[0], -second], abs=1e-6)
    zero = {"baseline": lambda n: torch.zeros(n).double()} if algorithm is ReMax else {}
    for old in (BEHAVIOR, THETA, [0.6, 0.1]):
        assert toy_gradient(module, behavior=BEHAVIOR, old=old, **zero) == expected


@pytest.mark.parametrize("ages", [[0] * 6, [0, 2, 0, 1, 3, 0]], ids=["fresh", "some stale"])
@pytest.mark.parametrize(("algorithm", "has_ratio"), [(REINFORCE, False), (GRPO, True)])
def test_an_unbiased_kl_starts_from_what_the_weighted_rows_stand_for(algorithm, has_ratio, ages):
    """From pi_old on fresh rows and beside a ratio to it; from the policy now where the weights already lead there."""
    module = build(algorithm, loss_agg="token-mean", **UNBIASED)
    rows = replace(rows_for("", module.models.policy), staleness=torch.tensor(ages))
    scores = module.score(rows)
    mask, stale = rows.response_mask, (rows.staleness > 0).unsqueeze(1)
    lp, old = scores.logprobs, rows.old_logprobs
    delta = (lp - rows.ref_logprobs)[mask]
    start = torch.where(stale & (not has_ratio), lp.detach(), old)
    target = old if has_ratio else lp.detach()
    weights = (target - rows.behavior_logprobs).exp().clamp(0.5, 2.0) * 0.99 ** rows.staleness.double().unsqueeze(1)
    weights = torch.where(stale, weights, 1.0)
    expected = (weights[mask] * (lp - start)[mask].exp() * ((-delta).exp() - 1 + delta)).mean()

    found = module.compute_loss(module.score(rows), rows)["kl_loss"]
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)
    assert_gradients_equal(gradients(module, found), gradients(module, expected), atol=1e-9)


@pytest.mark.parametrize(("place", "logged"), [("reward", 0.2), ("loss", 0.201024)])
def test_the_coefficient_logged_is_the_one_used(place, logged):
    """The rewards are shaped before the coefficient adapts, the loss is taken after."""
    module = build(RLOO, kl_coef=0.2, kl_target=6.0, kl_in=place)
    old, ref = torch.zeros(256, 2).double(), torch.full((256, 2), -4.5).double()
    experience = module.experience(rollout_of([0.0] * 256, [2] * 256, logprobs=old, ref_logprobs=ref))
    assert module.current_kl_coef == pytest.approx(0.201024, abs=1e-9)
    assert take_stats(module)["stability/kl_coef"] == pytest.approx(logged, abs=1e-7)
    if place == "reward":
        assert experience.rewards[0].tolist() == pytest.approx([-logged * 4.5] * 2)
        return
    batch = replace(rows_for("", module.models.policy), staleness=None)
    terms, scores = module.compute_loss(module.score(batch), batch), module.score(batch)
    delta = torch.where(batch.response_mask, scores.logprobs - batch.ref_logprobs, 0.0)
    k3 = module.aggregate((-delta).exp() - 1 + delta, batch, module.loss_agg)
    assert terms["kl_loss"].item() == pytest.approx(logged * k3.item(), rel=1e-9)

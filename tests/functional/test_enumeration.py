"""Expected gradients by enumerating every outcome of toy policies, against the true gradient of the objective.

The policies are plain sums over outcomes; only the estimators, losses and aggregations come from the library.
"""

import itertools
import math

import pytest
import torch

from lit_rlhf.functional import (
    aggregate,
    clipped_policy_loss,
    group_normalize,
    importance_weights,
    kl_estimate,
    leave_one_out,
    rewards_to_go,
)
from lit_rlhf.functional.policy_losses import policy_ratio, sequence_ratio

ARM_REWARDS = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
TRUE_BANDIT = [1 / 6, -1 / 6, 0]


def bandit(estimator, group_size):
    """Expected ascent direction of the three logits at the uniform policy, over all 3^G groups."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)
    total = 0.0
    for arms in itertools.product(range(3), repeat=group_size):
        arms = torch.tensor(arms)
        advantages = estimator(ARM_REWARDS[arms])[:, None]
        mask = torch.ones(group_size, 1, dtype=torch.bool)
        lp = logp[arms][:, None]
        loss = aggregate(clipped_policy_loss(lp, lp.detach(), advantages), mask, "seq-mean-token-sum")
        total = total - loss / 3**group_size
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient.tolist()


def one_group(fn, *args):
    return lambda rewards: fn(rewards, torch.zeros(len(rewards), dtype=torch.long), *args)


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("estimator", [lambda r: r, lambda r: r - 0.7, one_group(leave_one_out)])
def test_unbiased_baselines(estimator, group_size):
    # C22
    assert bandit(estimator, group_size) == pytest.approx(TRUE_BANDIT, abs=1e-12)


@pytest.mark.parametrize(
    ("scale", "group_size", "first"),
    [("none", 2, 1 / 6 * 1 / 2), ("none", 3, 1 / 6 * 2 / 3), ("std", 2, 0.1571348), ("std", 3, 0.2451408)],
)
def test_biased_group_baselines(scale, group_size, first):
    # C22; ddof 0 would give .2222222 and .3002350
    assert bandit(one_group(group_normalize, scale, 0.0), group_size)[0] == pytest.approx(first, abs=1e-7)


# A language model of two steps over {a, EOS}: logit of a against EOS at either step, at most two tokens.
THETA, BEHAVIOUR, REFERENCE = [0.4, -0.3], [-0.2, 0.5], [0.1, 0.1]
OUTCOMES = (("e",), ("a", "e"), ("a", "a"))
REWARDS = torch.tensor([0.2, 0.0, 1.0], dtype=torch.float64)
MASK = torch.tensor([[True, False], [True, True], [True, True]])
TRUE_GRADIENT = [0.054193, 0.146354]


def token_logprobs_of(theta):
    """Log-probabilities `[3, 2]` of the three outcomes' tokens, NaN where there is none."""
    rows = []
    for outcome in OUTCOMES:
        row = [-torch.log1p((-theta[t] if y == "a" else theta[t]).exp()) for t, y in enumerate(outcome)]
        rows.append(torch.stack(row + [theta.new_full((), math.nan)] * (2 - len(row))))
    return torch.stack(rows)


def probabilities(logits):
    a1, a2 = (1 / (1 + math.exp(-z)) for z in logits)
    return [1 - a1, a1 * (1 - a2), a1 * a2]


class ToyLM:
    def __init__(self):
        self.theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
        self.lp = token_logprobs_of(self.theta)
        self.lp_b = token_logprobs_of(torch.tensor(BEHAVIOUR, dtype=torch.float64))
        self.lp_ref = token_logprobs_of(torch.tensor(REFERENCE, dtype=torch.float64))

    def sums(self, lp):
        return torch.where(MASK, lp, 0.0).sum(1)

    def gradient(self, per_token, sampled_from=THETA, mode="seq-mean-token-sum", batch=1):
        """−Σ_batches P(batch)·∇aggregate(batch): the expected ascent direction."""
        p, total = probabilities(sampled_from), 0.0
        for rows in itertools.product(range(3), repeat=batch):
            chance = math.prod(p[i] for i in rows)
            total = total - chance * aggregate(per_token[list(rows)], MASK[list(rows)], mode, 2)
        (gradient,) = torch.autograd.grad(total, self.theta, retain_graph=True)
        return pytest.approx(gradient.tolist(), abs=2e-6)


@pytest.fixture
def lm():
    return ToyLM()


def test_objective_and_its_gradient(lm):
    objective = (lm.sums(lm.lp).exp() * REWARDS).sum()
    (gradient,) = torch.autograd.grad(objective, lm.theta)
    assert objective.item() == pytest.approx(0.3350385, abs=1e-7)
    assert gradient.tolist() == pytest.approx(TRUE_GRADIENT, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "batch", "expected"),
    [
        ("seq-mean-token-sum", 1, TRUE_GRADIENT),
        ("seq-mean-token-sum", 2, TRUE_GRADIENT),
        ("seq-mean-token-sum-norm", 1, [x / 2 for x in TRUE_GRADIENT]),
        ("seq-mean-token-mean", 1, [0.003070, 0.073177]),
        ("token-mean", 2, [0.019498, 0.082966]),
    ],
)
def test_aggregations(lm, mode, batch, expected):
    # C23: only sums over tokens follow the objective
    loss = -REWARDS[:, None] * lm.lp
    assert expected == lm.gradient(loss, mode=mode, batch=batch)


def test_importance_sampling(lm):
    # C23: samples from another policy
    behaviour = {"sampled_from": BEHAVIOUR}
    reward, wide = REWARDS[:, None], (0.0, math.inf)
    loss = -reward * lm.lp
    assert lm.gradient(loss, **behaviour) == [0.046616, 0.160965]
    sequence = importance_weights(lm.sums(lm.lp), lm.sums(lm.lp_b), *wide)
    assert sum(p * w for p, w in zip(probabilities(BEHAVIOUR), sequence.tolist(), strict=True)) == pytest.approx(1)
    assert lm.gradient(sequence[:, None] * loss, **behaviour) == TRUE_GRADIENT
    token = importance_weights(lm.lp, lm.lp_b, *wide)
    assert lm.gradient(token * loss, **behaviour) == [0.101500, 0.110047]
    prefix = importance_weights(lm.lp.cumsum(1), lm.lp_b.cumsum(1), *wide)
    assert lm.gradient(prefix * loss, **behaviour) == [0.101500, 0.146354]
    geometric = sequence_ratio(lm.lp, lm.lp_b, MASK).detach()
    assert lm.gradient(geometric * loss, **behaviour) == [0.059175, 0.153486]
    surrogate = -reward * policy_ratio(lm.sums(lm.lp), lm.sums(lm.lp_b))[:, None]
    surrogate = torch.where(torch.tensor([True, False]), surrogate, torch.zeros(1))
    assert lm.gradient(surrogate, **behaviour) == TRUE_GRADIENT


def test_kl_in_the_reward_is_the_kl_of_sequences(lm):
    # C23
    p = probabilities(THETA)
    for estimator in ("k1", "k3"):
        total = lm.sums(kl_estimate(lm.lp, lm.lp_ref, estimator)).tolist()
        assert sum(x * y for x, y in zip(p, total, strict=True)) == pytest.approx(0.0228528, abs=1e-7)
    k1 = kl_estimate(lm.lp, lm.lp_ref).detach()
    away = [-0.076840, 0.058542]  # ascent of −KL
    assert away == lm.gradient(rewards_to_go(k1, MASK) * lm.lp)
    assert away == lm.gradient(lm.sums(k1)[:, None] * lm.lp)


def test_kl_in_the_loss_holds_the_states_fixed(lm):
    # C23
    ratio = (lm.lp - lm.lp.detach()).exp()
    k1, k2, k3 = (kl_estimate(lm.lp, lm.lp_ref, estimator) for estimator in ("k1", "k2", "k3"))
    assert lm.gradient(k1) == [0, 0]
    assert lm.gradient(k2) == [-0.072078, 0.058542]
    assert lm.gradient(ratio * k3) == [-0.072078, 0.058542]
    assert lm.gradient(k3) == [-0.073708, 0.059523]


def test_rloo_with_kl_and_remax():
    # C21
    rewards = torch.tensor([1.0, 0.0]) - 0.05 * torch.tensor([0.2, 0.4])
    assert leave_one_out(rewards, torch.tensor([5, 5])).tolist() == pytest.approx([1.01, -1.01], abs=1e-6)

import math

import pytest
import torch

from lit_rlhf.functional import (
    aggregate,
    approx_kl,
    cispo_policy_loss,
    clip_statistics,
    clipped_policy_loss,
    clipped_value_loss,
    gspo_policy_loss,
    importance_weights,
)
from lit_rlhf.functional.policy_losses import policy_ratio, sequence_ratio

NAN, INF = float("nan"), float("inf")


def at_ratio(loss, ratio, advantage, **kwargs):
    """Loss and its gradient with respect to the log-prob, for one token at this ratio."""
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    lp = (old + math.log(ratio)).requires_grad_()
    value = loss(lp, old, torch.full_like(old, advantage), **kwargs)
    value.sum().backward()
    return value.item(), lp.grad.item()


class TestClip:
    @pytest.mark.parametrize(
        ("advantage", "ratio", "kwargs", "loss", "gradient"),
        [
            (1, 0.5, {}, -0.5, -0.5),
            (1, 1.0, {}, -1, -1),
            (1, 1.25, {}, -1.2, 0),
            (1, 1.5, {}, -1.2, 0),
            (1, 1.25, {"clip_ratio_high": 0.28}, -1.25, -1.25),
            (1, 1.5, {"clip_ratio_high": 0.28}, -1.28, 0),
            (-1, 0.5, {}, 0.8, 0),
            (-1, 0.5, {"clip_ratio_high": 0.28}, 0.8, 0),
            (-1, 0.5, {"clip_ratio_low": 0.3}, 0.7, 0),
            (-1, 0.75, {"clip_ratio_low": 0.3}, 0.75, 0.75),
            (-1, 0.9, {}, 0.9, 0.9),
            (-1, 1.5, {}, 1.5, 1.5),
            (-1, 4, {}, 4, 4),
            (-1, 4, {"dual_clip": 3.0}, 3, 0),
            (-2, 4, {"dual_clip": 3.0}, 6, 0),
            (-1, 1.5, {"dual_clip": 3.0}, 1.5, 1.5),
            (1, 4, {"dual_clip": 3.0}, -1.2, 0),
            (0, 4, {"dual_clip": 3.0}, 0, 0),
        ],
    )
    def test_oracles(self, advantage, ratio, kwargs, loss, gradient):
        # C6; for A < 0 the minimum is over objectives, not losses, and the range is not flipped
        assert at_ratio(clipped_policy_loss, ratio, advantage, **kwargs) == pytest.approx((loss, gradient), abs=1e-9)

    def test_without_a_clip_it_is_the_ratio_objective(self):
        lp, old, a = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
        torch.testing.assert_close(clipped_policy_loss(lp, old, a, INF, INF), -(lp - old).exp() * a)

    def test_a_dual_clip_that_cannot_be_is_named(self):
        with pytest.raises(ValueError, match=r"above 1, got 0\.5"):
            clipped_policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), dual_clip=0.5)


def test_far_log_ratios_are_held_at_twenty():
    ratio = policy_ratio(torch.tensor([100.0, -100.0, 20.0]), torch.zeros(3))
    assert ratio.tolist() == pytest.approx([math.exp(20), math.exp(-20), math.exp(20)], rel=1e-5)
    sequence = sequence_ratio(torch.tensor([[100.0, 100.0]]), torch.zeros(1, 2), torch.ones(1, 2))
    assert sequence[0].tolist() == pytest.approx([math.exp(20)] * 2, rel=1e-5)
    loss = clipped_policy_loss(torch.tensor([1000.0]), torch.zeros(1), -torch.ones(1))
    assert torch.isfinite(loss).all()


class TestGSPO:
    LOG_RATIO = torch.tensor([[0.1, -0.1, 0.3]], dtype=torch.float64)

    def run(self, advantage, low=3e-4, high=4e-4, width=5):
        """Loss and gradient of the oracle's row, with NaN pads and an empty row."""
        lp = torch.full((2, width), NAN, dtype=torch.float64)
        lp[0, :3] = self.LOG_RATIO
        old = torch.full_like(lp, INF)
        old[0, :3] = 0
        advantages = torch.full_like(lp, NAN)
        advantages[0, :3] = advantage
        mask = torch.zeros(2, width, dtype=torch.bool)
        mask[0, :3] = True
        lp.requires_grad_()
        per_token = gspo_policy_loss(lp, old, advantages, mask, low, high)
        loss = aggregate(per_token, mask, "seq-mean-token-mean")
        loss.backward()
        assert (per_token[~mask] == 0).all()
        assert (lp.grad[~mask] == 0).all()
        return loss.item(), lp.grad[0, :3].tolist()

    def test_oracles(self):
        # C8; 1.3498588 would be the product of the ratios instead of the mean of their logs
        loss, gradient = self.run(1.0, low=INF, high=INF)
        assert loss == pytest.approx(-1.1051709, abs=1e-7)
        assert gradient == pytest.approx([-0.3683903] * 3, abs=1e-7)
        loss, gradient = self.run(1.0)
        assert loss == pytest.approx(-1.0004, abs=1e-9)
        assert gradient == pytest.approx([0] * 3, abs=1e-12)
        loss, gradient = self.run(-1.0)
        assert loss == pytest.approx(1.1051709, abs=1e-7)
        assert gradient == pytest.approx([0.3683903] * 3, abs=1e-7)

    def test_defaults_are_the_papers(self):
        ones = torch.ones(1, 3, dtype=torch.float64)
        high = gspo_policy_loss(self.LOG_RATIO, 0 * ones, ones, ones)
        assert high[0].tolist() == pytest.approx([-1.0004] * 3, abs=1e-12)
        low = gspo_policy_loss(-self.LOG_RATIO, 0 * ones, -ones, ones)
        assert low[0].tolist() == pytest.approx([0.9997] * 3, abs=1e-12)

    def test_of_one_token_it_is_the_clip(self):
        # C30
        lp, old, a = (torch.randn(8, 1) for _ in range(3))
        torch.testing.assert_close(
            gspo_policy_loss(lp, old, a, torch.ones(8, 1), 0.2, 0.3), clipped_policy_loss(lp, old, a, 0.2, 0.3)
        )


class TestCISPO:
    def test_oracle(self):
        # C9
        lp = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
        old = lp - torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).log()
        lp.requires_grad_()
        loss = aggregate(cispo_policy_loss(lp, old, torch.ones_like(lp), clip_max=2.0), torch.ones(1, 3))
        loss.backward()
        assert loss.item() == pytest.approx(2.8333333, abs=1e-7)
        assert lp.grad[0].tolist() == pytest.approx([-1 / 6, -1 / 3, -2 / 3], abs=1e-7)

    def test_bounds_are_absolute(self):
        value, gradient = at_ratio(cispo_policy_loss, 0.5, 2.0, clip_min=0.9)
        assert gradient == pytest.approx(-0.9 * 2)
        assert value == pytest.approx(-0.9 * 2 * (-1.3 + math.log(0.5)))
        assert at_ratio(cispo_policy_loss, 1e-3, 1.0)[1] == pytest.approx(-1e-3)  # defaults 0 and 5
        assert at_ratio(cispo_policy_loss, 7.0, 1.0)[1] == pytest.approx(-5)


class TestValueLoss:
    @pytest.mark.parametrize(
        ("value", "old", "ret", "loss", "gradient"),
        [
            (1.0, 0.0, 1.0, 0.32, 0),
            (0.1, 0.0, 1.0, 0.405, -0.9),
            (-1.0, 0.0, -1.0, 0.32, 0),
            (2.0, 1.0, 0.0, 2.0, 2.0),  # moved away from the target: not clipped
            (5.0, 3.0, 4.0, 0.5, 1.0),  # by hand: max(1, .8²)/2
        ],
    )
    def test_oracles(self, value, old, ret, loss, gradient):
        # C18
        v = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        got = clipped_value_loss(v, torch.tensor([old]).double(), torch.tensor([ret]).double(), 0.2)
        got.backward()
        assert got.item() == pytest.approx(loss, abs=1e-12)
        assert v.grad.item() == pytest.approx(gradient, abs=1e-12)

    def test_maximum_is_per_element(self):
        # the max of the two means would give (max(.405, .725)) = .725 / 2 rows = .3625 too low or high
        v = torch.tensor([[1.0, 0.1]])
        loss = clipped_value_loss(v, torch.zeros(1, 2), torch.ones(1, 2), 0.2)
        assert aggregate(loss, torch.ones(1, 2)).item() == pytest.approx((0.32 + 0.405) / 2, abs=1e-7)

    def test_ppo_total(self):
        # C18
        value = clipped_value_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), 0.2).item()
        assert -0.2 + 0.5 * value - 0.01 * 0.5 + 0.01 * 0.02 == pytest.approx(-0.0448, abs=1e-7)


class TestImportanceWeights:
    RAW = torch.tensor([[0.2, 1.0, 5.0]], dtype=torch.float64)
    GAP = torch.tensor([3])

    def weights(self, *args, **kwargs):
        return importance_weights(self.RAW.log(), torch.zeros_like(self.RAW), *args, **kwargs)[0].tolist()

    def test_clip_then_decay(self):
        # C10; decay then clip would give [.5, .970299, 2]
        got = self.weights(staleness_decay=0.99, version_gap=self.GAP)
        assert got == pytest.approx([0.4851495, 0.970299, 1.940598], abs=1e-7)
        assert self.weights() == pytest.approx([0.5, 1, 2])
        assert self.weights(0.0) == pytest.approx([0.2, 1, 2])
        assert self.weights(0.1, 10.0, version_gap=self.GAP) == pytest.approx([0.2, 1, 5])

    def test_a_gap_per_row(self):
        got = importance_weights(torch.zeros(2, 3), torch.zeros(2, 3), 0.5, 2.0, 0.5, torch.tensor([1, 2]))
        assert got.tolist() == [[0.5] * 3, [0.25] * 3]

    def test_of_sequences(self):
        # C10: the product of ratios; Signal gives [N]
        total = torch.tensor([0.2 - 0.1 + 0.3, -5.0])
        got = importance_weights(total, torch.zeros(2), 0.1, 10.0, 0.5, torch.tensor([0, 1]))
        assert got.tolist() == pytest.approx([1.4918247, 0.05], abs=1e-6)

    def test_geometric_and_prefix_ratios(self):
        # C10
        log_ratio = torch.tensor([[0.2, -0.1, 0.3]], dtype=torch.float64)
        geometric = sequence_ratio(log_ratio, 0 * log_ratio, torch.ones(1, 3))
        assert geometric[0].tolist() == pytest.approx([1.1426308] * 3, abs=1e-7)
        prefix = importance_weights(log_ratio.cumsum(1), 0 * log_ratio)
        assert prefix[0].tolist() == pytest.approx([1.2214028, 1.1051709, 1.4918247], abs=1e-7)


class TestClipStatistics:
    def test_by_hand(self):
        ratio = torch.tensor([0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.0, 1.25, 0.75])
        advantages = torch.tensor([1.0, -1, 0, 1, -1, 0, 1, 1, -1])
        stats = clip_statistics(ratio, advantages, 0.3, 0.28)
        assert stats["clip_fraction_low"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0]
        assert stats["clip_fraction_high"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]
        assert stats["clip_fraction"].tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0]
        assert stats["ratio_out_of_range"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0]
        assert not any(value.requires_grad for value in stats.values())

    def test_marks_the_tokens_without_a_gradient(self):
        lp = torch.randn(500, dtype=torch.float64, requires_grad=True)
        advantages = torch.randn(500, dtype=torch.float64)
        clipped_policy_loss(lp, torch.zeros_like(lp), advantages, 0.1, 0.3).sum().backward()
        stats = clip_statistics(lp.exp(), advantages, 0.1, 0.3)
        assert torch.equal(lp.grad == 0, stats["clip_fraction"].bool())
        assert 0 < stats["clip_fraction"].mean() < stats["ratio_out_of_range"].mean() < 1


def test_all_losses_agree_on_policy():
    # C29: ratio 1, advantages constant per row
    mask = torch.arange(4) < torch.tensor([4, 2, 1])[:, None]
    start = torch.randn(3, 4, dtype=torch.float64)
    advantages = torch.randn(3, 1, dtype=torch.float64).expand(3, 4)
    losses = {
        "reinforce": lambda lp: -advantages * lp,
        "clip": lambda lp: clipped_policy_loss(lp, start, advantages),
        "dapo": lambda lp: clipped_policy_loss(lp, start, advantages, 0.2, 0.28, 3.0),
        "gspo": lambda lp: gspo_policy_loss(lp, start, advantages, mask),
        "cispo": lambda lp: cispo_policy_loss(lp, start, advantages),
    }
    gradients = {}
    for name, loss in losses.items():
        lp = start.clone().requires_grad_()
        aggregate(loss(lp), mask, "seq-mean-token-mean").backward()
        gradients[name] = lp.grad
    by_hand = -advantages / mask.sum(1, keepdim=True) / 3 * mask
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, by_hand, rtol=0, atol=1e-12)
    stats = clip_statistics(policy_ratio(start, start), advantages, 3e-4, 3e-4)
    assert sum(value.sum() for value in stats.values()) == 0
    assert approx_kl(start, start).abs().max() == 0


LOSSES = {
    "clip": lambda lp, old, a: clipped_policy_loss(lp, old, a, 0.2, 0.28),
    "dual": lambda lp, old, a: clipped_policy_loss(lp, old, a, 0.2, 0.28, dual_clip=1.4),
    "gspo": lambda lp, old, a: gspo_policy_loss(lp, old, a, torch.arange(3) < torch.tensor([[3], [1]]), 0.2, 0.3),
    "value": lambda v, old, ret: clipped_value_loss(v, old, ret, 0.3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    # C33, away from kinks; CISPO's weight is detached, so its check is TestCISPO
    x, old, other = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda y: LOSSES[name](y, old, other), x.requires_grad_())


@pytest.mark.parametrize("name", [*LOSSES, "cispo"])
def test_nothing_but_the_policy_gets_a_gradient(name):
    # C33
    x, old, other = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    LOSSES.get(name, cispo_policy_loss)(x, old, other).sum().backward()
    assert x.grad.abs().sum() > 0
    assert old.grad is None
    assert other.grad is None


def test_weights_carry_no_gradient():
    lp = torch.zeros(2, 3, requires_grad=True)
    assert not importance_weights(lp, torch.zeros(2, 3)).requires_grad

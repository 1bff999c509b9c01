import numpy as np
import pytest
import torch

from lit_rlhf.functional import (
    generalized_advantage_estimation,
    group_normalize,
    leave_one_out,
    masked_whiten,
    rewards_to_go,
)

NAN = float("nan")
V = [[0.5, 0.6, 0.7]]


def gae(rewards, values=V, mask=None, **kwargs):
    rewards, values = torch.tensor(rewards, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return generalized_advantage_estimation(rewards, values, mask, **kwargs)


def gae_by_the_papers_sum(rewards, values, mask, gamma, lam, bootstrap):
    """A_t = Σ_l (γλ)^l δ_{t+l} over each row's valid tokens, taken out of the row first."""
    advantages = np.zeros_like(rewards)
    for i in range(len(rewards)):
        at = np.flatnonzero(mask[i])
        r, v = rewards[i, at], np.append(values[i, at], bootstrap[i])
        for j, t in enumerate(at):
            deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(j, len(at))]
            advantages[i, t] = sum((gamma * lam) ** n * d for n, d in enumerate(deltas))
    return advantages


class TestGAE:
    @pytest.mark.parametrize(
        ("lam", "advantages", "returns"),
        [
            (0.8, [0.21712, 0.246, 0.3], [0.71712, 0.846, 1]),
            (0.0, [0.04, 0.03, 0.3], [0.54, 0.63, 1]),
            (1.0, [0.31, 0.3, 0.3], [0.81, 0.9, 1]),
        ],
    )
    def test_oracles(self, lam, advantages, returns):
        # C1
        a, ret = gae([[0, 0, 1]], gamma=0.9, gae_lambda=lam)
        assert a[0].tolist() == pytest.approx(advantages, abs=1e-12)
        assert ret[0].tolist() == pytest.approx(returns, abs=1e-12)

    def test_bootstrap_is_the_discounted_value_added_to_the_last_reward(self):
        a, _ = gae([[0, 0, 1]], gamma=0.9, gae_lambda=0.8, bootstrap=torch.tensor([0.8], dtype=torch.float64))
        assert a[0].tolist() == pytest.approx([0.590368, 0.7644, 1.02], abs=1e-12)
        same, _ = gae([[0, 0, 1 + 0.9 * 0.8]], gamma=0.9, gae_lambda=0.8)
        torch.testing.assert_close(a, same, rtol=0, atol=1e-12)

    def test_holes_are_stepped_over(self):
        a, ret = gae([[0, 7, 1]], [[0.5, 9, 0.7]], [[True, False, True]], gamma=0.9, gae_lambda=0.8)
        assert a[0].tolist() == pytest.approx([0.346, 0, 0.3], abs=1e-12)
        assert ret[0].tolist() == pytest.approx([0.846, 0, 1.0], abs=1e-12)

    def test_undiscounted_and_whitened(self):
        a, _ = gae([[-0.05, -0.02, 1]], gae_lambda=1.0)
        assert a[0].tolist() == pytest.approx([0.43, 0.38, 0.3], abs=1e-12)
        a, _ = gae([[0, 0, 1]], gamma=0.9, gae_lambda=0.8)
        white = masked_whiten(a, torch.ones(1, 3, dtype=torch.bool))
        assert white[0].tolist() == pytest.approx([-0.8855, -0.1990, 1.0845], abs=1e-4)

    def test_defaults_are_gamma_one_lambda_point_95(self):
        torch.testing.assert_close(gae([[0, 0, 1]])[0], gae([[0, 0, 1]], gamma=1.0, gae_lambda=0.95)[0], rtol=0, atol=0)
        assert gae([[0, 0, 1]])[0][0, 1].item() == pytest.approx(0.1 + 0.95 * 0.3, abs=1e-12)

    def test_ragged_rows_with_holes_against_the_papers_sum(self):
        rng = np.random.default_rng(0)
        rewards, values = rng.normal(size=(6, 9)), rng.normal(size=(6, 9))
        mask = rng.random((6, 9)) < 0.6
        mask[2] = False
        bootstrap = rng.normal(size=6)
        expected = gae_by_the_papers_sum(rewards, values, mask, 0.9, 0.7, bootstrap)
        rewards[~mask], values[~mask] = NAN, np.inf
        a, ret = generalized_advantage_estimation(
            *(torch.tensor(x) for x in (rewards, values, mask)), 0.9, 0.7, torch.tensor(bootstrap)
        )
        np.testing.assert_allclose(a, expected, atol=1e-12)
        np.testing.assert_allclose(ret[mask], expected[mask] + values[mask], atol=1e-12)
        assert (ret[~torch.tensor(mask)] == 0).all()

    def test_gradients_stop_at_the_mask(self):
        r = torch.tensor([[1.0, NAN, 2.0, NAN]], requires_grad=True)
        v = torch.tensor([[0.5, NAN, 0.1, float("inf")]], requires_grad=True)
        a, ret = generalized_advantage_estimation(r, v, torch.tensor([[True, False, True, False]]))
        (a.sum() + 2 * ret.sum()).backward()
        for x in (r, v):
            assert torch.isfinite(x.grad).all()
            assert x.grad[0, [1, 3]].tolist() == [0, 0]

    def test_no_columns_and_a_wrong_rank(self):
        empty = torch.zeros(2, 0)
        assert generalized_advantage_estimation(empty, empty, empty)[1].shape == (2, 0)
        with pytest.raises(ValueError, match=r"\[N, T\].*\(3,\)"):
            generalized_advantage_estimation(torch.zeros(3), torch.zeros(3), torch.ones(3))


class TestRewardsToGo:
    def test_oracle(self):
        # C1
        rtg = rewards_to_go(torch.tensor([[1.0, 2, 3]]), torch.ones(1, 3), 0.9)
        assert rtg[0].tolist() == pytest.approx([5.23, 4.7, 3], abs=1e-6)

    def test_terminal_reward_reaches_every_token_and_no_pad(self):
        r = torch.tensor([[NAN, 0, 2, NAN], [0, NAN, 0, -1]])
        mask = torch.tensor([[False, True, True, False], [True, False, True, True]])
        assert rewards_to_go(r, mask).tolist() == [[0, 2, 2, 0], [-1, 0, -1, -1]]

    def test_undiscounted_gae_with_lambda_one_is_return_minus_value(self):
        r, v, mask = torch.randn(3, 5), torch.randn(3, 5), torch.rand(3, 5) < 0.7
        a, ret = generalized_advantage_estimation(r, v, mask, 1.0, 1.0)
        torch.testing.assert_close(ret, rewards_to_go(r, mask), rtol=0, atol=1e-5)
        torch.testing.assert_close(a, (rewards_to_go(r, mask) - v) * mask, rtol=0, atol=1e-5)


GROUP = torch.zeros(4, dtype=torch.long)
BINARY = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)


def by_groups(rewards, ids, kind, eps):
    """Each group taken out on its own, NaN left out."""
    out = np.zeros(len(rewards))
    for g in set(ids.tolist()):
        at = np.flatnonzero((ids == g) & ~np.isnan(rewards))
        r = rewards[at]
        for i in at:
            if len(r) < 2 or len(set(r.tolist())) == 1:
                continue
            if kind == "loo":
                others = [rewards[j] for j in at if j != i]
                out[i] = rewards[i] - sum(others) / len(others)
            else:
                scale = {"std": r, "batch": rewards[~np.isnan(rewards)]}.get(kind)
                out[i] = (rewards[i] - r.mean()) / (1 if scale is None else scale.std(ddof=1) + eps)
    return out


class TestGroups:
    @pytest.mark.parametrize(("eps", "value"), [(1e-4, 0.8658754), (1e-6, 0.8660239), (0.0, 0.8660254)])
    def test_std(self, eps, value):
        # C5
        assert group_normalize(BINARY, GROUP, eps=eps).tolist() == pytest.approx(
            [value, -value, -value, value], abs=1e-7
        )

    def test_default_is_std_with_eps_1e_4(self):
        assert group_normalize(BINARY, GROUP)[0].item() == pytest.approx(0.8658754, abs=1e-7)

    def test_none_and_leave_one_out(self):
        assert group_normalize(BINARY, GROUP, "none").tolist() == [0.5, -0.5, -0.5, 0.5]
        assert leave_one_out(BINARY, GROUP).tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3], abs=1e-12)
        three = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
        assert leave_one_out(three, GROUP[:3]).tolist() == pytest.approx([1.5, -1.5, 0], abs=1e-12)
        assert group_normalize(three, GROUP[:3], eps=0).tolist() == pytest.approx([1, -1, 0], abs=1e-12)

    def test_one_of_eight_correct(self):
        r = torch.zeros(8, dtype=torch.float64)
        r[3] = 1
        ids = torch.zeros(8, dtype=torch.long)
        a = group_normalize(r, ids, eps=0)
        assert (a[3].item(), a[0].item()) == pytest.approx((2.474874, -0.353553), abs=1e-6)
        a = leave_one_out(r, ids)
        assert (a[3].item(), a[0].item()) == pytest.approx((1, -1 / 7), abs=1e-12)

    def test_integer_rewards(self):
        assert leave_one_out(torch.tensor([3, 1, 2]), GROUP[:3]).tolist() == [1.5, -1.5, 0]

    def test_centred_groups_then_global_whitening(self):
        # C24, REINFORCE++-baseline: one token each
        a = group_normalize(torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), "none")
        white = masked_whiten(a[:, None], torch.ones(4, 1, dtype=torch.bool))[:, 0]
        assert white.tolist() == pytest.approx([1.2247449, -1.2247449, 0, 0], abs=1e-6)

    @pytest.mark.parametrize("kind", ["std", "none", "batch", "loo"])
    def test_shuffled_groups_with_nan_against_a_loop(self, kind):
        rng = np.random.default_rng(1)
        ids = rng.permutation(np.repeat([-7, 3, 10**12, 4, 5, 6], [4, 2, 5, 1, 3, 2]))
        rewards = rng.normal(size=len(ids)) * 3 + 100
        rewards[np.flatnonzero(ids == 3)[0]] = NAN  # leaves a singleton
        rewards[np.flatnonzero(ids == 10**12)[2]] = NAN
        rewards[ids == 5] = 0.1
        rewards[ids == 6] = NAN
        r, g = torch.tensor(rewards), torch.tensor(ids)
        got = leave_one_out(r, g) if kind == "loo" else group_normalize(r, g, kind)
        np.testing.assert_allclose(got, by_groups(rewards, ids, kind, 1e-4), atol=1e-10)
        assert (got[torch.tensor(np.isnan(rewards) | (ids == 4) | (ids == 5))] == 0).all()

        order = torch.tensor(rng.permutation(len(ids)))
        again = leave_one_out(r[order], g[order]) if kind == "loo" else group_normalize(r[order], g[order], kind)
        torch.testing.assert_close(again, got[order], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("n", [2, 3, 7])
    def test_equal_rewards_give_exactly_zero(self, n):
        # in float32 the mean of 0.1s is not 0.1
        ids = torch.zeros(n, dtype=torch.long)
        for value in (0.1, 1 / 3, 1e-8, 123.4567):
            r = torch.full((n,), value)
            for scale in ("std", "none", "batch"):
                assert group_normalize(r, ids, scale, eps=0).abs().max() == 0
            assert leave_one_out(r, ids).abs().max() == 0
        other = torch.cat([torch.full((n,), 0.1), torch.tensor([0.0, 1.0])])
        a = group_normalize(other, torch.cat([ids, torch.tensor([1, 1])]), "batch")
        assert a[:n].abs().max() == 0
        assert a[-1] > 0.5

    def test_scale_and_shift_of_rewards(self):
        # C31
        r, ids = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
        for shift in (5.0, -300.0):
            for scale in ("std", "none", "batch"):
                torch.testing.assert_close(group_normalize(r + shift, ids, scale), group_normalize(r, ids, scale))
            torch.testing.assert_close(leave_one_out(r + shift, ids), leave_one_out(r, ids))
        for scale in ("std", "batch"):
            torch.testing.assert_close(group_normalize(9 * r, ids, scale, 0), group_normalize(r, ids, scale, 0))
        torch.testing.assert_close(leave_one_out(9 * r, ids), 9 * leave_one_out(r, ids))
        torch.testing.assert_close(leave_one_out(r, ids), group_normalize(r, ids, "none") * 4 / 3)

    def test_gradients_are_finite(self):
        r = torch.tensor([1.0, 0.0, NAN, 0.5, 0.5, 2.0], requires_grad=True)
        ids = torch.tensor([0, 0, 0, 1, 1, 2])
        for scale in ("std", "none", "batch"):
            (group_normalize(r, ids, scale).square().sum() + leave_one_out(r, ids).square().sum()).backward()
        assert torch.isfinite(r.grad).all()
        assert r.grad[2] == 0

    def test_empty_and_bad_input(self):
        none = torch.zeros(0)
        assert group_normalize(none, none.long()).shape == leave_one_out(none, none.long()).shape == (0,)
        with pytest.raises(ValueError, match="'std', 'none' or 'batch', got 'group'"):
            group_normalize(BINARY, GROUP, "group")
        with pytest.raises(ValueError, match=r"\(2, 2\) and \(4,\)"):
            leave_one_out(BINARY.view(2, 2), GROUP)

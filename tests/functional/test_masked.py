import numpy as np
import pytest
import torch

from lit_rlhf.functional import explained_variance, masked_mean, masked_whiten
from lit_rlhf.functional.masked import masked_var, zero_outside

NAN, INF = float("nan"), float("inf")


def ragged(seed=0, offset=0.0):
    """A random `[4, 7]` tensor with ragged rows, one of them empty, NaN and Inf outside the mask."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4, 7)) + offset
    lengths = [7, 3, 0, 5]
    mask = np.arange(7) < np.array(lengths)[:, None]
    x[~mask] = rng.choice([NAN, INF, -INF, 1e30], size=(~mask).sum())
    return torch.tensor(x), torch.tensor(mask), x[mask]


def test_mean_and_variance_are_those_of_the_valid_cells():
    x, mask, cells = ragged(offset=1000.0)
    assert masked_mean(x, mask).item() == pytest.approx(cells.mean(), rel=1e-12)
    assert masked_var(x, mask).item() == pytest.approx(cells.var(ddof=1), rel=1e-10)


def test_masks_of_numbers_count_as_booleans():
    x, mask, _ = ragged()
    torch.testing.assert_close(masked_mean(x, mask.double()), masked_mean(x, mask), rtol=0, atol=0)


def test_whitening_of_one_to_four():
    # C4; [-.158, .474, 1.107, 1.739] would mean that the pads were counted
    x = torch.tensor([[1.0, 2, 3, 4, NAN, NAN, NAN, NAN]])
    mask = torch.arange(8)[None] < 4
    expected = torch.tensor([[-1.161895, -0.387298, 0.387298, 1.161895, 0, 0, 0, 0]])
    torch.testing.assert_close(masked_whiten(x, mask), expected, rtol=0, atol=1e-5)
    kept = expected + torch.tensor([[2.5] * 4 + [0.0] * 4])
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), kept, rtol=0, atol=1e-5)


def test_whitened_cells_have_mean_zero_and_variance_one():
    x, mask, cells = ragged(3, offset=5.0)
    white = masked_whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].var().item() == pytest.approx(1, rel=1e-7)
    assert white[~mask].abs().max() == 0
    assert masked_whiten(x, mask, False)[mask].mean().item() == pytest.approx(cells.mean(), rel=1e-12)


@pytest.mark.parametrize("unbiased", [[0.5630, 0.5916, -1.1546]])
def test_whitened_returns_of_reinforce_pp(unbiased):
    # C24: tokens of all rows are whitened together
    returns = torch.tensor([[2.0, 2.05], [-1.0, NAN]])
    mask = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(masked_whiten(returns, mask)[mask], torch.tensor(unbiased), rtol=0, atol=1e-4)


@pytest.mark.parametrize("valid", [0, 1])
def test_too_few_cells_give_zero_and_keep_the_graph(valid):
    x = torch.tensor([3.0, NAN, INF], requires_grad=True)
    mask = torch.arange(3) < valid
    assert masked_mean(x, mask).item() == 3.0 * valid
    assert masked_var(x, mask).item() == 0
    total = masked_mean(x, mask) + masked_var(x, mask) + masked_whiten(x, mask).sum()
    total.backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[valid:] == 0).all()
    assert masked_whiten(x, mask).abs().max() == 0


def test_gradients_stop_at_the_mask():
    x, mask, _ = ragged()
    x.requires_grad_()
    (masked_whiten(x, mask)[0, 0] + masked_mean(x, mask) + masked_whiten(x, mask, False)[1, 1]).backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[~mask] == 0).all()
    assert (x.grad[mask] != 0).all()


def test_zero_outside_refuses_another_shape():
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 1\)"):
        zero_outside(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))


class TestExplainedVariance:
    Y = torch.tensor([1.0, 2.0, 3.0, 4.0])

    @pytest.mark.parametrize(
        ("values", "expected"),
        [([1.5, 2, 3, 3.5], 0.9), ([6, 7, 8, 9], 1.0), ([7, 7, 7, 7], 0.0), ([-1, -2, -3, -4], -3.0)],
    )
    def test_oracles(self, values, expected):
        # C14; -3 shows that it is unbounded below
        y = torch.cat([self.Y, torch.tensor([NAN, INF])])
        v = torch.cat([torch.tensor(values, dtype=torch.float), torch.tensor([0.0, NAN])])
        mask = torch.arange(6) < 4
        assert explained_variance(v, y, mask).item() == pytest.approx(expected, abs=1e-6)

    def test_is_zero_where_returns_do_not_vary(self):
        y, mask = torch.full((3, 5), 0.1), torch.ones(3, 5, dtype=torch.bool)
        assert explained_variance(torch.randn(3, 5), y, mask).item() == 0
        assert explained_variance(torch.randn(3, 5), y, torch.zeros_like(mask)).item() == 0
        assert explained_variance(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool)).item() == 0

    def test_large_offset_keeps_its_digits(self):
        y = np.random.default_rng(1).normal(size=400)
        v = 0.8 * y + 0.2
        expected = 1 - np.var(y - v) / np.var(y)
        mask = torch.ones(400, dtype=torch.bool)
        got = explained_variance(torch.tensor(v + 1000).float(), torch.tensor(y + 1000).float(), mask)
        assert got.item() == pytest.approx(expected, abs=1e-3)

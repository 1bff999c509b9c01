import math

import pytest
import torch

from lit_rlhf.functional import bradley_terry_loss, dpo_loss

C, R = torch.tensor([1.0], dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64)  # C11: -10+11, -12+11.5
KINDS = (("sigmoid", 0.0), ("sigmoid", 0.1), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0))


@pytest.mark.parametrize(
    ("kind", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, 0.6209570),
        ("sigmoid", 0.1, 0.6359570),
        ("robust", 0.1, 0.6022070),
        ("hinge", 0.0, 0.85),
        ("ipo", 0.0, 12.25),
    ],
)
def test_oracles(kind, smoothing, expected):
    # C11
    assert dpo_loss(C, R, 0.1, smoothing, kind).item() == pytest.approx(expected, abs=1e-7)


def test_defaults():
    assert dpo_loss(C, R).item() == pytest.approx(0.6209570, abs=1e-7)


def test_ipo_of_token_means():
    # C11: lengths 5 and 4
    assert dpo_loss(C / 5, R / 4, kind="ipo").item() == pytest.approx(21.855625, abs=1e-9)


def test_gradient():
    chosen = C.clone().requires_grad_()
    dpo_loss(chosen, R).backward()
    assert chosen.grad.item() == pytest.approx(-0.0462570, abs=1e-7)


@pytest.mark.parametrize(
    ("kind", "smoothing", "expected"),
    [
        ("sigmoid", 0, 0.6931472),
        ("sigmoid", 0.3, 0.6931472),
        ("robust", 0.3, 0.6931472),
        ("hinge", 0, 1),
        ("ipo", 0, 25),
    ],
)
def test_at_the_reference(kind, smoothing, expected):
    zero = torch.zeros(1, dtype=torch.float64)
    assert dpo_loss(zero, zero, 0.1, smoothing, kind).item() == pytest.approx(expected, abs=1e-7)


def test_identities():
    c, r = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    beta, u = 0.3, c - r
    # C34: swapping the pair turns u around
    torch.testing.assert_close(dpo_loss(c, r, beta) - dpo_loss(r, c, beta), -beta * u)
    torch.testing.assert_close(bradley_terry_loss(c, r) - bradley_terry_loss(r, c), -u)
    # C30, C31
    torch.testing.assert_close(dpo_loss(c, r, beta, kind="robust"), dpo_loss(c, r, beta), rtol=0, atol=0)
    torch.testing.assert_close(dpo_loss(c + 5, r + 5, beta), dpo_loss(c, r, beta))
    torch.testing.assert_close(bradley_terry_loss(c + 5, r + 5), bradley_terry_loss(c, r))
    torch.testing.assert_close(bradley_terry_loss(beta * c, beta * r), dpo_loss(c, r, beta))
    # the robust loss undoes flipped labels on average: (1-e)·L(u) + e·L(-u) is the loss without flips
    e = 0.2
    mixed = (1 - e) * dpo_loss(c, r, beta, e, "robust") + e * dpo_loss(r, c, beta, e, "robust")
    torch.testing.assert_close(mixed, dpo_loss(c, r, beta))


@pytest.mark.parametrize(
    ("delta", "margin", "temperature", "expected"),
    [
        (2.0, 0.0, 1.0, 0.1269280),
        (2.0, 1.0, 1.0, 0.3132617),
        (2.0, 1.0, 0.5, 0.1269280),
        (2.0, 1.5, 0.5, 0.3132617),
        (2.0, 0.5, 0.5, 0.0485874),  # the seeds' σ(Δ/τ − m) with m = 1
        (0.0, 0.1, 0.1, 1.3132617),
        (0.0, 1.0, 0.1, 10.0000454),
    ],
)
def test_bradley_terry(delta, margin, temperature, expected):
    # C12
    chosen = torch.tensor([3.0 + delta], dtype=torch.float64)
    rejected = torch.tensor([3.0], dtype=torch.float64)
    assert bradley_terry_loss(chosen, rejected, margin, temperature).item() == pytest.approx(expected, abs=1e-7)


def test_bradley_terry_defaults_and_a_margin_per_pair():
    chosen, rejected = torch.tensor([2.0, 2.0]), torch.zeros(2)
    assert bradley_terry_loss(chosen, rejected)[0].item() == pytest.approx(0.1269280, abs=1e-6)
    per_pair = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 1.0]))
    assert per_pair.tolist() == pytest.approx([0.1269280, 0.3132617], abs=1e-6)


def test_extreme_margins_stay_finite():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo_loss(far, torch.zeros(2), 1.0)
    loss.sum().backward()
    assert loss.tolist() == [0, 1e4]
    assert far.grad.tolist() == [0, -1]


@pytest.mark.parametrize(("kind", "smoothing"), KINDS)
def test_gradcheck(kind, smoothing):
    c, r = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: dpo_loss(a, b, 0.2, smoothing, kind), (c, r))
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry_loss(a, b, 0.3, 0.7), (c, r))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'sigmoid', 'hinge', 'ipo' or 'robust', got 'slic'"):
        dpo_loss(C, R, kind="slic")
    with pytest.raises(ValueError, match=r"\[0, 0.5\), got 0.5"):
        dpo_loss(C, R, label_smoothing=0.5)
    with pytest.raises(ValueError, match="no meaning for kind 'ipo'"):
        dpo_loss(C, R, label_smoothing=0.1, kind="ipo")
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        bradley_terry_loss(C, R, temperature=0)
    assert math.isfinite(dpo_loss(C, R, label_smoothing=0.49).item())

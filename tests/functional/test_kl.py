import pytest
import torch

from lit_rlhf.functional import approx_kl, kl_estimate, rewards_to_go

PI, REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
TRUE_KL, TRUE_GRADIENT = 0.0252671539, [0.0989382, -0.0938848, -0.0050534]


def expected(estimator, weight=lambda logp: 1.0):
    """E over y ~ π of the estimate, and the mean over y of its gradient with respect to π's logits."""
    logits = PI.log().requires_grad_()
    logp = logits.log_softmax(0)
    terms = PI * weight(logp) * kl_estimate(logp, REF.log(), estimator)
    (gradient,) = torch.autograd.grad(terms.sum(), logits)
    return terms.sum().item(), gradient.tolist()


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", TRUE_KL, [0, 0, 0]),
        ("k2", 0.0248624073, TRUE_GRADIENT),
        ("k3", TRUE_KL, [0.1, -0.1, 0]),  # that of the other direction: π − ref
    ],
)
def test_expected_value_and_gradient(estimator, value, gradient):
    # C3, exact by enumeration of the three outcomes
    got_value, got_gradient = expected(estimator)
    assert got_value == pytest.approx(value, abs=1e-9)
    assert got_gradient == pytest.approx(gradient, abs=1e-7)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_with_a_differentiable_ratio_the_gradient_is_that_of_kl(estimator):
    _, gradient = expected(estimator, weight=lambda logp: (logp - PI.log()).exp())
    assert gradient == pytest.approx(TRUE_GRADIENT, abs=1e-7)


def test_sampled_tokens_and_the_kl_reward():
    # C2
    lp, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.5]])
    for estimator, value in {"k1": [0.5, -0.5], "k2": [0.125, 0.125], "k3": [0.10653066, 0.14872127]}.items():
        assert kl_estimate(lp, ref, estimator)[0].tolist() == pytest.approx(value, abs=1e-6)
    rewards = torch.tensor([[0.0, 2.0]]) - 0.1 * kl_estimate(lp, ref)
    assert rewards[0].tolist() == pytest.approx([-0.05, 2.05], abs=1e-6)
    assert rewards_to_go(rewards, torch.ones(1, 2))[0].tolist() == pytest.approx([2.0, 2.05], abs=1e-6)


@pytest.mark.parametrize(
    ("d", "k1", "k2", "k3"),
    [([0.1, -0.1], 0, 0.005, 0.00500417), ([0.2, -0.2], 0, 0.02, 0.02006676), ([0.3, 0.1], -0.2, 0.025, 0.0275148636)],
)
def test_approx_kl_of_an_update(d, k1, k2, k3):
    # C15; the last row (by hand: (e^.3 + e^.1)/2 - 1.2) tells the sign of d inside k3
    lp_old = torch.tensor([-2.0, -1.0], dtype=torch.float64)
    lp = lp_old + torch.tensor(d, dtype=torch.float64)
    for estimator, value in (("k1", k1), ("k2", k2), ("k3", k3)):
        assert approx_kl(lp, lp_old, estimator).mean().item() == pytest.approx(value, abs=1e-8)
    assert approx_kl(lp, lp_old).mean().item() == pytest.approx(k3, abs=1e-8)


def test_approx_kl_is_unbiased_on_samples_of_the_old_policy():
    # E over y ~ π_old of k1 and k3 is KL(π_old‖π)
    truth = (PI * (PI / REF).log()).sum().item()
    for estimator in ("k1", "k3"):
        assert (PI * approx_kl(REF.log(), PI.log(), estimator)).sum().item() == pytest.approx(truth, abs=1e-12)


def test_k3_is_never_negative_and_all_vanish_at_the_reference():
    lp, ref = -torch.rand(1000) * 30, -torch.rand(1000) * 30
    assert (kl_estimate(lp, ref, "k3") >= 0).all()
    assert (approx_kl(lp, ref, "k3") >= 0).all()
    for estimator in ("k2", "k3"):
        at_ref = ref.clone().requires_grad_()
        value = kl_estimate(at_ref, ref, estimator)
        value.sum().backward()
        assert value.abs().max() == 0
        assert at_ref.grad.abs().max() == 0


def test_far_apart_policies_stay_finite():
    lp = torch.tensor([0.0, -500.0], requires_grad=True)
    k3 = kl_estimate(lp, torch.tensor([-500.0, 0.0]), "k3")
    k3.sum().backward()
    assert k3.tolist() == pytest.approx([19.0, 485165194.4], rel=1e-6)  # Δ = ±20
    assert torch.isfinite(lp.grad).all()


def test_only_the_policy_gets_a_gradient():
    lp, other = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    for fn in (kl_estimate, approx_kl):
        for estimator in ("k1", "k2", "k3"):
            fn(lp, other, estimator).sum().backward()
    assert other.grad is None
    assert lp.grad is not None


@pytest.mark.parametrize("fn", [kl_estimate, approx_kl])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck(fn, estimator):
    lp = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fn(x, torch.full_like(x, -0.3), estimator), lp)


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")

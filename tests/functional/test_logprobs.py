import math

import numpy as np
import pytest
import torch

from lit_rlhf.functional import aggregate, token_entropy, token_logprobs


def by_hand(logits, token, temperature):
    """Log-probability and entropy by sums over plain numbers."""
    weights = [math.exp(z / temperature) for z in logits]
    probabilities = [w / sum(weights) for w in weights]
    return math.log(probabilities[token]), -sum(p * math.log(p) for p in probabilities)


@pytest.mark.parametrize(
    ("temperature", "logprob", "entropy"),
    [
        (1.0, -0.4076060, 0.8323956),
        (0.5, -0.1429316, 0.4410574),
        (0.7, -0.2601184, 0.6505726),
        (2.0, -0.6802697, 1.0201913),
    ],
)
def test_oracles(temperature, logprob, entropy):
    # C13
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    assert token_logprobs(logits, torch.tensor([0]), temperature).item() == pytest.approx(logprob, abs=1e-6)
    assert token_entropy(logits, temperature).item() == pytest.approx(entropy, abs=1e-6)


def test_entropy_of_known_distributions():
    assert token_entropy(torch.tensor([0.5, 0.25, 0.25]).log()).item() == pytest.approx(1.0397208, abs=1e-6)
    assert token_entropy(torch.zeros(4)).item() == pytest.approx(1.3862944, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_token_against_plain_sums(temperature):
    rng = np.random.default_rng(0)
    z, ids = rng.normal(size=(2, 3, 5)) * 3, rng.integers(0, 5, size=(2, 3))
    logits, tokens = torch.tensor(z), torch.tensor(ids)
    lp, h = token_logprobs(logits, tokens, temperature), token_entropy(logits, temperature)
    for i in range(2):
        for t in range(3):
            expected = by_hand(z[i, t], ids[i, t], temperature)
            assert (lp[i, t].item(), h[i, t].item()) == pytest.approx(expected, rel=1e-10)
    flat = token_logprobs(logits.reshape(6, 5), tokens.reshape(6), temperature)
    torch.testing.assert_close(flat, lp.reshape(6), rtol=0, atol=0)
    assert ((h >= 0) & (h <= math.log(5))).all()


def test_entropy_gradient():
    # C13: -p(log p + H)
    logits = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    token_entropy(logits).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.28259, 0.14077, 0.14182]), rtol=0, atol=1e-5)
    uniform = torch.zeros(5, requires_grad=True)
    token_entropy(uniform).backward()
    torch.testing.assert_close(uniform.grad, torch.zeros(5), rtol=0, atol=1e-7)


def test_forbidden_tokens_count_as_probability_zero():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    entropy = token_entropy(logits, 0.5)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-6)
    assert torch.isfinite(logits.grad).all()
    assert token_logprobs(logits, torch.tensor([0])).item() == pytest.approx(-math.log(2), abs=1e-6)


@pytest.mark.parametrize(("vocabulary", "expected"), [(4, 1.3862944), (50257, 10.8249051)])
def test_cross_entropy_of_zero_logits_is_log_vocabulary(vocabulary, expected):
    # C25, whatever the mask
    logits, ids = torch.zeros(2, 3, vocabulary), torch.zeros(2, 3, dtype=torch.long)
    for mask in (torch.ones(2, 3), torch.tensor([[1, 0, 0], [1, 1, 0]])):
        assert aggregate(-token_logprobs(logits, ids), mask).item() == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_scored_in_float32():
    logits = (torch.randn(4, 100) * 5).bfloat16()
    ids = torch.randint(100, (4,))
    torch.testing.assert_close(token_logprobs(logits, ids), token_logprobs(logits.float(), ids), rtol=0, atol=0)
    torch.testing.assert_close(token_entropy(logits), token_entropy(logits.float()), rtol=0, atol=0)
    assert token_entropy(logits.double()).dtype == torch.float64


def test_gradcheck():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(4, (2, 3))
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, ids, 0.7), logits)
    assert torch.autograd.gradcheck(lambda z: token_entropy(z, 0.7), logits)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"temperature must be above 0.*got 0"):
        token_entropy(torch.zeros(3), 0)
    with pytest.raises(ValueError, match=r"ids \(2,\)"):
        token_logprobs(torch.zeros(3, 5), torch.zeros(2, dtype=torch.long))

"""Log-probs from hidden states, tile by tile: the numbers and gradients of the formulas, and nothing of size K x V."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from lit_rlhf.functional import linear_logprobs, token_entropy, token_logprobs


def inputs(K=7, H=5, V=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in ((K, H), (V, H), (V,))
    )
    return hidden, weight, bias, torch.randint(0, V, (K,), generator=generator)


def by_sums(hidden, weight, bias, ids, temperature):
    """Log-probs and entropies by the definitions, in numpy."""
    u = (hidden.detach().numpy() @ weight.detach().numpy().T + bias.detach().numpy()) / temperature
    p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
    return np.log(p[np.arange(len(ids)), ids.numpy()]), -(p * np.log(p)).sum(1)


TILES = [(1, 1), (2, 3), (3, 11), (7, 4), (100, 100)]  # of 7 tokens and a vocabulary of 11


@pytest.mark.parametrize("tile", TILES)
def test_the_definitions(tile):
    hidden, weight, bias, ids = inputs()
    logprobs, entropy = linear_logprobs(hidden, weight, ids, bias, 0.7, entropy=True, tile=tile)
    expected = by_sums(hidden, weight, bias, ids, 0.7)
    np.testing.assert_allclose(logprobs.detach(), expected[0], rtol=1e-12)
    np.testing.assert_allclose(entropy.detach(), expected[1], rtol=1e-12)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gradient_by_finite_differences(tile, entropy, with_bias):
    hidden, weight, bias, ids = inputs()

    def numbers(hidden, weight, bias):
        found = linear_logprobs(hidden, weight, ids, bias if with_bias else None, 1.3, entropy, tile)
        return found if entropy else found[0]

    bias = bias if with_bias else bias.detach()
    assert gradcheck(numbers, (hidden, weight, bias))


def test_the_gradient_is_that_of_the_plain_functions():
    grads = []
    for fused in (True, False):
        hidden, weight, bias, ids = inputs(dtype=torch.float32, K=50, V=300)
        if fused:
            logprobs, entropy = linear_logprobs(hidden, weight, ids, bias, 0.9, entropy=True, tile=(16, 70))
        else:
            logits = torch.nn.functional.linear(hidden, weight, bias)
            logprobs, entropy = token_logprobs(logits, ids, 0.9), token_entropy(logits, 0.9)
        weights = torch.linspace(-1, 1, 50)
        ((logprobs * weights).sum() + 0.3 * (entropy * weights.flip(0)).sum()).backward()
        grads.append([x.grad for x in (hidden, weight, bias)])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_only_what_is_trained_gets_a_gradient():
    hidden, weight, _, ids = inputs()
    linear_logprobs(hidden, weight.detach(), ids)[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0
    hidden, weight, _, ids = inputs()
    linear_logprobs(hidden.detach(), weight, ids)[0].sum().backward()
    assert hidden.grad is None
    assert weight.grad.abs().sum() > 0


def test_a_forbidden_token_adds_nothing_to_the_entropy():
    hidden, weight, bias, ids = inputs()
    ids = ids.clamp(max=9)
    with torch.no_grad():
        bias[10] = float("-inf")
    logprobs, entropy = linear_logprobs(hidden, weight, ids, bias, entropy=True)
    (logprobs.sum() + 1e6 * entropy.sum()).backward()
    without = linear_logprobs(hidden, weight[:10], ids, bias[:10], entropy=True)
    torch.testing.assert_close((logprobs, entropy), without)
    assert hidden.grad.isfinite().all()
    assert weight.grad[:10].isfinite().all()


def test_a_tile_of_forbidden_tokens_alone():
    hidden, weight, bias, ids = inputs()
    allowed = torch.tensor([4, 5, 6, 10])
    bias = bias.detach().index_fill(0, torch.tensor([0, 1, 2, 3, 7, 8, 9]), float("-inf"))
    ids = allowed[ids % 4]
    found = linear_logprobs(hidden, weight, ids, bias, entropy=True, tile=(3, 2))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(found, (token_logprobs(logits, ids), token_entropy(logits)))
    found[0].sum().backward()
    assert hidden.grad.isfinite().all()


def test_weights_that_change_before_the_backward_pass_are_told():
    hidden, weight, _, ids = inputs()
    logprobs, _ = linear_logprobs(hidden, weight, ids)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_no_tokens():
    hidden, weight, bias, ids = inputs(K=0)
    logprobs, entropy = linear_logprobs(hidden, weight, ids, bias, entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert weight.grad.abs().sum() == 0


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    hidden, weight, bias, ids = inputs(K=200, H=64, V=500, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = linear_logprobs(hidden, weight, ids, bias)
        plain = token_logprobs(torch.nn.functional.linear(hidden, weight, bias), ids)
    exact = linear_logprobs(hidden, weight, ids, bias)[0]
    assert logprobs.dtype == torch.float32
    assert not torch.equal(logprobs, exact)
    torch.testing.assert_close(logprobs, exact, rtol=0, atol=0.2)
    assert (logprobs - exact).abs().mean() <= 1.1 * (plain - exact).abs().mean()
    logprobs.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_logits_of_all_rows_are_never_held(monkeypatch):
    """What the backward pass keeps, and every buffer that is made, is smaller than K x V."""
    hidden, weight, _, ids = inputs(K=64, H=4, V=1000, dtype=torch.float32)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x))
            return out

    with Sizes():
        logprobs, entropy = linear_logprobs(hidden, weight, ids, entropy=True, tile=(8, 100))
        (logprobs + entropy).sum().backward()
    assert max(sizes) == 4000  # W and its gradient


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_cannot_be(temperature):
    hidden, weight, _, ids = inputs()
    with pytest.raises(ValueError, match="temperature must be above 0"):
        linear_logprobs(hidden, weight, ids, temperature=temperature)


def test_large_logits_lose_no_more_than_by_log_softmax():
    hidden, weight, _, ids = inputs(K=300, H=32, V=2000, dtype=torch.float32)
    hidden, weight = hidden.detach() * 10, weight.detach()
    exact = token_logprobs((hidden.double() @ weight.double().T), ids)
    plain = token_logprobs(hidden @ weight.T, ids)
    ours, _ = linear_logprobs(hidden, weight, ids, tile=(64, 150))
    assert (ours - exact).abs().mean() <= 1.2 * (plain - exact).abs().mean()

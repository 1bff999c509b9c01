"""The KL to the reference summed over the vocabulary, at the sampling temperature."""

import math

import pytest
import torch

from lit_rlhf.functional import exact_kl
from lit_rlhf.models.scoring import score
from lit_rlhf.models.wrapper import PolicyReferenceValue
from tests.helpers import random_experience, tiny_model


def by_hand(logits, ref_logits, temperature):
    p, q = ([math.exp(z / temperature) for z in row] for row in (logits, ref_logits))
    p, q = ([x / sum(row) for x in row] for row in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_is_the_sum_over_the_vocabulary(temperature):
    g = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    found = exact_kl(logits, ref, temperature)
    for i in range(2):
        for t in range(3):
            expected = by_hand(logits[i, t].tolist(), ref[i, t].tolist(), temperature)
            assert found[i, t].item() == pytest.approx(expected, abs=1e-12)


def test_the_worked_numbers():
    # C3
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64).log().requires_grad_()
    kl = exact_kl(logits, ref)
    assert kl.item() == pytest.approx(0.0252671539, abs=1e-9)
    kl.backward()
    assert logits.grad.tolist() == pytest.approx([0.0989382, -0.0938848, -0.0050534], abs=1e-7)
    assert ref.grad is None


def test_tokens_that_neither_allows_add_nothing():
    logits = torch.tensor([[1.0, -math.inf, 0.0]], requires_grad=True)
    kl = exact_kl(logits, torch.tensor([[0.0, -math.inf, 0.0]]))
    assert kl.item() == pytest.approx(by_hand([1.0, 0.0], [0.0, 0.0], 1.0), abs=1e-6)
    kl.sum().backward()
    assert logits.grad[0, [0, 2]].isfinite().all()


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(4, 64).bfloat16()
    found = exact_kl(logits, logits + 0.25)
    assert found.dtype == torch.float32
    assert found.abs().max() < 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_models_kl_of_every_row_alone(temperature):
    model, reference, rows = tiny_model().double(), tiny_model(seed=1).double(), random_experience((3, 7, 0, 5, 2, 6))
    found = score(model, rows, temperature=temperature, reference=reference).kl
    for i, n in enumerate(rows.response_mask.sum(1).tolist()):
        ids = torch.cat([rows.prompt_ids[i][rows.prompt_mask[i]], rows.response_ids[i, :n]]).unsqueeze(0)
        logits, ref_logits = (m(ids).logits[0] for m in (model, reference))
        P = ids.shape[1] - n
        expected = [by_hand(logits[P + t - 1].tolist(), ref_logits[P + t - 1].tolist(), temperature) for t in range(n)]
        assert found[i, :n].tolist() == pytest.approx(expected, abs=1e-9)
        assert (found[i, n:] == 0).all()


def test_the_reference_of_a_kl_gets_no_gradient():
    models = PolicyReferenceValue(tiny_model(), reference=True)
    with torch.no_grad():
        models.policy.lm_head.weight.mul_(1.2)
    models.score(random_experience(dtype=torch.float32), exact_kl=True).kl.sum().backward()
    assert all(p.grad is None for p in models.reference.parameters())
    assert any((p.grad != 0).any() for p in models.policy.parameters())

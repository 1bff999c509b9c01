"""Gradients: those of finite differences, and to the policy and the value function alone (C33)."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.models.scoring import Scores
from tests.algorithms.settings import (
    AGGREGATIONS,
    ON_POLICY,
    SETTINGS,
    demonstrations,
    rows_for,
    setting,
    with_other_models,
)
from tests.helpers import build, gradients, tiny_model

# losses with a detached factor are no function whose differences are their gradient; their derivatives are written
# out in test_paper_losses.py
DETACHED = ("CISPO", "GSPO-token", "ImportanceSampling", "ImportanceSampling by sequence", "ImportanceSampling by sums")
FROZEN = ("old_logprobs", "ref_logprobs", "advantages", "behavior_logprobs", "values", "returns")


def leaves(module, batch):
    """Scores near those of the rows, as inputs."""
    g = torch.Generator().manual_seed(11)
    noise = lambda: torch.randn(batch.response_mask.shape, generator=g, dtype=torch.float64)  # noqa: E731
    found = {"logprobs": batch.old_logprobs + 0.3 * noise(), "entropy": 1 + noise().abs()}
    found["kl"] = noise().abs() if module.exact_kl else None
    found["values"] = batch.values + 0.5 * noise() if module.value != "none" else None
    return {name: x.requires_grad_() for name, x in found.items() if x is not None}


@pytest.mark.parametrize("name", [name for name in ON_POLICY if name not in DETACHED])
def test_the_losss_gradient_is_that_of_finite_differences(name):
    module, batch = setting(name)
    inputs = leaves(module, batch)

    def loss(*values):
        return sum(module.compute_loss(Scores(**dict(zip(inputs, values, strict=True))), batch).values())

    assert torch.autograd.gradcheck(loss, tuple(inputs.values()), eps=1e-6, atol=1e-6)
    found = torch.autograd.grad(loss(*inputs.values()), inputs.values(), allow_unused=True)
    for key, gradient in zip(inputs, found, strict=True):
        in_the_loss = key != "entropy" or module.entropy_coef
        assert (gradient is not None and (gradient != 0).any()) == bool(in_the_loss), key


@pytest.mark.parametrize("name", ON_POLICY)
def test_gradients_reach_the_policy_and_the_value_function_alone(name):
    module, batch = setting(name)
    frozen = {n: getattr(batch, n).clone().requires_grad_() for n in FROZEN}

    module.training_step(replace(batch, **frozen)).backward()

    assert all(x.grad is None or (x.grad == 0).all() for x in frozen.values())
    if module.models.reference is not None:
        assert all(p.grad is None for p in module.models.reference.parameters())
    assert any((p.grad != 0).any() for p in module.models.policy.parameters())
    for part in (module.models.value_trunk, module.models.value_head):
        assert part is None or any((p.grad != 0).any() for p in part.parameters())


@pytest.mark.parametrize("name", ["PPO", "ConservativePPO k2"])
def test_a_separate_value_function_and_the_policy_learn_apart(name):
    module, batch = setting(name)
    scores = module.score(batch)
    terms = module.compute_loss(scores, batch)
    value, policy = terms.pop("value_loss"), sum(terms.values())
    names = {
        term: {n for n, gradient in gradients(module, loss).items() if (gradient != 0).any()}
        for term, loss in (("value", value), ("policy", policy))
    }
    assert {n.split(".")[0] for n in names["value"]} == {"value_trunk", "value_head"}
    assert {n.split(".")[0] for n in names["policy"]} == {"policy"}


def test_a_shared_value_function_moves_the_trunk():
    module, batch = setting("PPO shared")
    value = module.compute_loss(module.score(batch), batch)["value_loss"]
    moved = {n for n, gradient in gradients(module, value).items() if (gradient != 0).any()}
    assert "value_head.weight" in moved
    assert "policy.model.layers.0.mlp.up_proj.weight" in moved
    assert "policy.lm_head.weight" not in moved


@pytest.mark.parametrize("entropy", ["full", "none"])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_the_entropy_has_a_gradient_only_where_it_is_in_the_loss(entropy, coefficient):
    module, batch = setting("GRPO", entropy=entropy, entropy_coef=coefficient)
    scores = module.score(batch)
    assert (scores.entropy is None) == (entropy == "none" and not coefficient)
    if scores.entropy is not None:
        assert scores.entropy.requires_grad == bool(coefficient)
    module.training_step(batch)
    assert ("stability/entropy" in module.stats.compute()) == (scores.entropy is not None)


def finite_differences(module, batch, names):
    found = gradients(module, module.training_step(batch))
    parameters = dict(module.models.named_parameters())
    for name in names:
        parameter, index, step = parameters[name], int(found[name].abs().argmax()), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[index] += sign * step
                values.append(module.training_step(batch).item())
                parameter.view(-1)[index] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert abs(expected) > 1e-6
        assert float(found[name].view(-1)[index]) == pytest.approx(expected, rel=1e-5, abs=1e-8), name


POLICY = [f"policy.transformer.{part}.weight" for part in ("wte", "h.0.attn.c_attn", "ln_f")]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("GRPO", POLICY),
        ("GRPO full KL", POLICY),
        ("DAPO", POLICY),
        ("PPO shared", [*POLICY, "value_head.weight"]),
        ("PPO", ["policy.transformer.wte.weight", "value_trunk.wte.weight", "value_head.weight"]),
        ("ConservativePPO", [*POLICY, "value_head.weight"]),
        ("RLOO", POLICY),
    ],
)
def test_the_models_gradient_is_that_of_finite_differences(name, parameters):
    algorithm, arguments = SETTINGS[name]
    module = with_other_models(build(algorithm, tiny_model("gpt2").double(), **arguments))  # Llama's norm is in float32
    finite_differences(module, rows_for(name, module.models.policy), parameters)


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
def test_under_any_aggregation_the_gradient_is_that_of_finite_differences(loss_agg):
    algorithm, arguments = SETTINGS["DAPO"]
    module = build(algorithm, tiny_model("gpt2").double(), **{**arguments, "loss_agg": loss_agg})
    finite_differences(module, rows_for("DAPO", module.models.policy), POLICY[:1])


def test_the_gradient_of_demonstrations_is_that_of_finite_differences():
    _, batch = demonstrations()
    finite_differences(build(SFT, tiny_model("gpt2").double()), batch, POLICY)

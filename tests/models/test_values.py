"""The value function reads the states before each token, in every architecture, shared or on its own (C35)."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.models.heads import ScalarHead
from lit_rlhf.models.wrapper import PolicyReferenceValue
from tests.helpers import KINDS, build, gradients, random_experience, tiny_model, with_columns

SHARING = ("shared", "separate")


def with_values(kind, value):
    """Models in float64 whose head is not zero."""
    models = PolicyReferenceValue(tiny_model(kind).double(), value=value)
    with torch.no_grad():
        models.value_head.weight.normal_(generator=torch.Generator().manual_seed(3))
    return models


def rows(lengths=(3, 7, 0, 5, 2, 6)):
    return random_experience(lengths)


@torch.no_grad()
def plain_values(models, batch):
    """V of each prefix on its own: the last state of the prompt and the tokens before t. And of the whole row."""
    trunk = models.policy.base_model if models.value_trunk is None else models.value_trunk
    found, last = torch.zeros(batch.response_mask.shape, dtype=torch.float64), torch.zeros(len(batch)).double()
    for i, n in enumerate(batch.response_mask.sum(1).tolist()):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i]]
        for t in range(n + 1):
            prefix = torch.cat([prompt, batch.response_ids[i, :t]]).unsqueeze(0)
            value = trunk(prefix).last_hidden_state[0, -1] @ models.value_head.weight
            if t < n:
                found[i, t] = value
            else:
                last[i] = value
    return found, last


@pytest.mark.parametrize("value", SHARING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_that_of_the_prefix_before_its_token(kind, value):
    models, batch = with_values(kind, value), rows()
    expected, last = plain_values(models, batch)

    alone = models.score_values(batch)
    with_the_policy = models.score(batch, values=True)

    torch.testing.assert_close(alone.values, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(alone.last, last, atol=1e-9, rtol=0)
    torch.testing.assert_close(with_the_policy.values, expected, atol=1e-9, rtol=0)
    assert expected.abs().max() > 0.5


@pytest.mark.parametrize("value", SHARING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_does_not_see_its_own_token(kind, value):
    models, batch, t = with_values(kind, value), rows(lengths=(7,) * 6), 3
    ids = batch.response_ids.clone()
    ids[:, t] = (ids[:, t] + 20) % 60 + 2
    changed = replace(batch, response_ids=ids)
    for read in (lambda x: models.score_values(x).values, lambda x: models.score(x, values=True).values):
        before, after = read(batch), read(changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1]), "V_t has seen token t"
        assert ((after[:, t + 1 :] - before[:, t + 1 :]).abs() > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_policys_last_hidden_states_are_those_of_its_trunk(kind):
    """What makes one forward pass do for a shared value function."""
    model, ids = tiny_model(kind).double(), torch.randint(2, 60, (3, 9))
    found = model(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, model.base_model(ids).last_hidden_state)


@pytest.mark.parametrize("kind", KINDS)
def test_to_begin_with_a_shared_and_a_separate_value_function_are_the_same(kind):
    batch = rows()
    shared, separate = (with_values(kind, value).score(batch, values=True).values for value in SHARING)
    torch.testing.assert_close(shared, separate, atol=1e-12, rtol=0)


@pytest.mark.parametrize("value", SHARING)
def test_padding_columns_change_no_value_and_no_gradient(value):
    models, batch = with_values("llama", value), rows()
    weights = torch.randn(batch.response_mask.shape, dtype=torch.float64)
    T = weights.shape[1]

    def gradients_of(x):
        module = type("Module", (), {"models": models, "zero_grad": models.zero_grad})()
        found = models.score_values(x)
        return found, gradients(module, (found.values[:, :T] * weights).sum() + found.last.sum())

    (before, expected), (after, found) = gradients_of(batch), gradients_of(with_columns(batch, 3, 4))
    torch.testing.assert_close(after.values[:, :T], before.values, atol=1e-9, rtol=0)
    torch.testing.assert_close(after.last, before.last, atol=1e-9, rtol=0)
    assert (after.values[:, T:] == 0).all()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=0)


def test_values_start_at_zero_and_learn():
    module, batch = build(PPO, kl_coef=0, value="shared"), rows()
    assert (module.models.score(batch, values=True).values == 0).all()
    batch = replace(batch, values=torch.zeros_like(batch.advantages), returns=torch.ones_like(batch.advantages))
    optimizer = module.configure_optimizers()["optimizer"]
    module.training_step(batch).backward()
    optimizer.step()
    assert (module.models.score(batch, values=True).values.sum(1)[batch.response_mask.any(1)] > 0).all()


def test_the_heads_initial_weights():
    assert (ScalarHead(tiny_model()).weight == 0).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = PolicyReferenceValue(tiny_model(hidden_size=256), value="shared", value_std=0.1)
    assert float(models.value_head.weight.std()) == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_computes_in_float32(autocast):
    models = PolicyReferenceValue(tiny_model().to(torch.bfloat16), value="shared", value_std=1.0)
    batch = random_experience(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = models.score_values(batch).values
        states = models.policy.base_model(torch.tensor([[5, 6, 7]])).last_hidden_state
        value = models.value_head(states)
    assert found.dtype == value.dtype == torch.float32
    assert (value == states.float() @ models.value_head.weight).all()
    assert with_values("llama", "shared").value_head.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("value", "value_lr", "lrs"), [("none", None, [0.1]), ("shared", None, [0.1, 0.1]), ("separate", 0.3, [0.1, 0.3])]
)
def test_the_value_functions_own_parameters_have_a_group_of_their_own(value, value_lr, lrs):
    arguments = {"advantage_estimator": "rewards_to_go"} if value == "none" else {}
    module = build(PPO, value=value, value_lr=value_lr, lr=0.1, **arguments)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["lr"] for group in groups] == lrs
    names = {id(p): name for name, p in module.models.named_parameters()}
    trainable = [names[id(p)] for group in groups for p in group["params"]]
    assert len(trainable) == len(set(trainable))
    assert set(trainable) == {name for name in names.values() if not name.startswith("reference")}
    if value != "none":
        own = {names[id(p)].split(".")[0] for p in groups[1]["params"]}
        assert own == ({"value_head"} if value == "shared" else {"value_trunk", "value_head"})


def test_without_a_value_function_asking_for_it_is_an_error():
    with pytest.raises(RuntimeError, match="no value function"):
        PolicyReferenceValue(tiny_model()).score_values(rows())

"""DPO and its relatives against worked numbers, loops over the paper's sums, and identities between them."""

import math
from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.errors import InputError
from lit_rlhf.models.scoring import Scores
from tests.helpers import assert_gradients_equal, build, gradients, tiny_model
from tests.pairs import CHOSEN, REJECTED, plain_pairs, random_pairs

VARIANTS = {
    "dpo": {},
    "conservative": {"label_smoothing": 0.1},
    "robust": {"kind": "robust", "label_smoothing": 0.1},
    "hinge": {"kind": "hinge"},
    "ipo": {"kind": "ipo"},
    "ipo sum": {"kind": "ipo", "ipo_sum": True},
}


def moved(**arguments):
    """A module in float64 whose policy is not its reference any more."""
    module = build(DPO, **arguments)
    module.models.reference.load_state_dict(tiny_model(seed=1).state_dict())
    return module


class Given:
    """Models whose log-probs are given: of the 2N completions, by the policy and by the reference."""

    reference = object()

    def __init__(self, policy, reference):
        self.policy_logprobs, self.reference_logprobs = policy, reference

    def score(self, rows):
        return Scores(self.policy_logprobs * rows.response_mask)  # 0 outside, as the scoring path has it

    def score_reference(self, rows):
        return Scores(self.reference_logprobs)


def oracle(**arguments):
    """C11: sums of -10 and -12 under the policy, -11 and -11.5 under the reference; 5 and 4 tokens."""
    module = build(DPO, **arguments)
    policy, reference = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    policy[0], policy[1, :4] = -10 / 5, -12 / 4
    reference[0], reference[1, :4] = -11 / 5, -11.5 / 4
    policy.requires_grad_()
    module.__dict__["models"] = Given(policy, reference)
    return module, random_pairs((5,), (4,), (2,)), policy


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("dpo", 0.6209570),
        ("conservative", 0.6359570),
        ("robust", 0.6022070),
        ("hinge", 0.85),
        ("ipo sum", 12.25),
        ("ipo", 21.855625),
    ],
)
def test_worked_numbers(variant, expected):
    module, batch, _ = oracle(**VARIANTS[variant])
    assert module.compare(batch).losses["dpo_loss"].tolist() == pytest.approx([expected], abs=1e-6)


def test_worked_rewards_and_gradient():
    module, batch, policy = oracle()
    found = module.compare(batch)
    assert found.chosen.tolist() == pytest.approx([0.1], abs=1e-9)
    assert found.rejected.tolist() == pytest.approx([-0.05], abs=1e-9)
    named = {name: value.item() for name, value in found.logged.items()}
    assert named == pytest.approx(
        {"implicit_reward": 0.15, "policy_accuracy": 1, "chosen_logps": -10, "rejected_logps": -12}
    )
    found.losses["dpo_loss"].sum().backward()
    assert policy.grad[0].tolist() == pytest.approx([-0.0462570] * 5, abs=1e-7)
    assert policy.grad[1].tolist() == pytest.approx([0.0462570] * 4 + [0], abs=1e-7)


def test_the_weight_of_a_token_in_ipo():
    """2 (u - 1/(2 beta)) over the completion's length, u = 1/5 + 0.5/4."""
    module, batch, policy = oracle(kind="ipo")
    module.compare(batch).losses["dpo_loss"].sum().backward()
    slope = 2 * (1 / 5 + 0.5 / 4 - 5)
    assert policy.grad[0].tolist() == pytest.approx([slope / 5] * 5, abs=1e-9)
    assert policy.grad[1].tolist() == pytest.approx([-slope / 4] * 4 + [0], abs=1e-9)


def paper_loss(variant, u, beta, smoothing):
    log_sigmoid = lambda x: -math.log(1 + math.exp(-x))  # noqa: E731
    if variant == "hinge":
        return max(0.0, 1 - beta * u)
    if variant.startswith("ipo"):
        return (u - 1 / (2 * beta)) ** 2
    right, flipped = -log_sigmoid(beta * u), -log_sigmoid(-beta * u)
    if variant == "robust":
        return ((1 - smoothing) * right - smoothing * flipped) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * flipped


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_and_the_metrics_are_the_papers_sums(variant, kind):
    """Sums over tokens, one sequence at a time, and means over the pairs."""
    module = build(DPO, tiny_model(kind).double(), beta=0.3, **VARIANTS[variant])
    module.models.reference.load_state_dict(tiny_model(kind, seed=1).state_dict())
    batch = random_pairs()
    policy, reference = (plain_pairs(model, batch) for model in (module.models.policy, module.models.reference))
    losses, rewards, policy_right = [], [], []
    for i in range(len(batch)):
        h = []
        for side, lengths in enumerate((CHOSEN, REJECTED)):
            tokens = [float(policy[side][i, t] - reference[side][i, t]) for t in range(lengths[i])]
            h.append(sum(tokens) / (lengths[i] if variant == "ipo" else 1))
        losses.append(paper_loss(variant, h[0] - h[1], 0.3, module.label_smoothing))
        rewards.append((0.3 * h[0], 0.3 * h[1]))
        policy_right.append(float(policy[0][i].sum() > policy[1][i].sum()))

    found = module.training_step(batch).item()

    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert found == pytest.approx(mean(losses), abs=1e-9)
    stats = module.pop_metrics()
    accuracy = mean([float(w > l) for w, l in rewards])  # noqa: E741
    assert 0 < accuracy < 1, "a batch on which accuracy can be wrong"
    expected = {
        "loss": mean(losses),
        "dpo_loss": mean(losses),
        "preference_accuracy": accuracy,
        "reward_margin": mean([w - r for w, r in rewards]),
        "implicit_reward": mean([w - r for w, r in rewards]),
        "chosen_reward": mean([w for w, _ in rewards]),
        "rejected_reward": mean([r for _, r in rewards]),
        "chosen_logps": float(policy[0].sum()) / 6,
        "rejected_logps": float(policy[1].sum()) / 6,
        "policy_accuracy": mean(policy_right),
    }
    assert stats == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("dpo", math.log(2)), ("conservative", math.log(2)), ("robust", math.log(2)), ("hinge", 1), ("ipo", 25)],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_at_the_reference_no_pair_is_ranked(variant, expected, kind):
    module = build(DPO, tiny_model(kind), **VARIANTS[variant])  # float32, as it is trained
    assert module.training_step(random_pairs()).item() == pytest.approx(expected, abs=1e-5)
    stats = module.pop_metrics()
    assert stats["preference_accuracy"] == 0, "equal rewards are not right"
    assert stats["reward_margin"] == stats["chosen_reward"] == 0
    assert 0 < stats["policy_accuracy"] < 1


def test_at_the_reference_the_gradient_is_half_beta_times_that_of_the_log_ratio():
    module, batch = build(DPO, beta=0.3), random_pairs()
    found = gradients(module, module.training_step(batch))
    logprobs = module.models.score(batch.completions()).logprobs.sum(1)
    expected = gradients(module, -0.3 / 2 * (logprobs[:6] - logprobs[6:]).mean())
    assert_gradients_equal(found, expected)


def swapped(batch):
    sides = {"chosen_ids": batch.rejected_ids, "rejected_ids": batch.chosen_ids}
    return replace(batch, **sides, chosen_mask=batch.rejected_mask, rejected_mask=batch.chosen_mask)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_swapped_pair_turns_the_sign_of_its_log_ratio(smoothing):
    """C34: L(u) - L(-u) = -beta u, times 1 - 2 eps with smoothed labels."""
    module, batch = moved(beta=0.3, label_smoothing=smoothing), random_pairs()
    right, wrong = module.compare(batch), module.compare(swapped(batch))
    margin = right.chosen - right.rejected
    torch.testing.assert_close(wrong.chosen - wrong.rejected, -margin, atol=1e-9, rtol=0)
    difference = right.losses["dpo_loss"] - wrong.losses["dpo_loss"]
    torch.testing.assert_close(difference, -(1 - 2 * smoothing) * margin, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
def test_without_smoothing_all_kinds_of_it_are_dpo(kind):
    module, batch = moved(kind=kind, label_smoothing=0.0), random_pairs()
    expected, found = moved().compare(batch), module.compare(batch)
    assert found.losses["dpo_loss"].tolist() == expected.losses["dpo_loss"].tolist()


def test_a_constant_added_to_policy_and_reference_changes_nothing():
    """C31: both completions' log-probs, under both models."""
    module, batch = build(DPO), random_pairs()
    mask = batch.completions().response_mask
    g = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(mask.shape, generator=g, dtype=torch.float64) * mask for _ in range(2))
    losses = []
    for shift in (0.0, 1.7):
        module.__dict__["models"] = Given(policy + shift * mask, reference + shift * mask)
        losses.append(module.compare(batch).losses["dpo_loss"])
    torch.testing.assert_close(*losses, atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "hinge"])
def test_the_gradient_is_that_of_finite_differences(variant):
    module = build(DPO, tiny_model("gpt2").double(), **VARIANTS[variant])  # Llama's norm is in float32
    module.models.reference.load_state_dict(tiny_model("gpt2", seed=1).state_dict())
    batch = random_pairs()
    found = gradients(module, module.training_step(batch))
    parameters = dict(module.models.named_parameters())
    for name in ("policy.transformer.wte.weight", "policy.transformer.h.0.attn.c_attn.weight"):
        index, step, values = int(found[name].abs().argmax()), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[name].view(-1)[index] += sign * step
                values.append(module.training_step(batch).item())
                parameters[name].view(-1)[index] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert float(found[name].view(-1)[index]) == pytest.approx(expected, rel=1e-4, abs=1e-8), name


def test_training_moves_the_policy_towards_the_pairs_and_leaves_the_reference():
    module, batch = build(DPO, beta=0.5), random_pairs()
    before = {name: weight.clone() for name, weight in module.models.reference.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in module.models.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        module.train()  # whatever Lightning does, the reference does not follow
        losses.append(module.training_step(batch))
        gradients(module, losses[-1])
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert module.pop_metrics()["preference_accuracy"] > 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in module.models.reference.state_dict().items())
    assert not module.models.reference.training
    assert all(p.grad is None for p in module.models.reference.parameters())


def test_given_reference_log_probs_are_used_and_get_no_gradient():
    module, batch = moved(), random_pairs()
    expected = module.training_step(batch)
    expected_gradients = gradients(module, expected)
    rows = module.models.score_reference(batch.completions()).logprobs
    garbage = torch.where(batch.completions().response_mask, rows, torch.nan).requires_grad_()
    chosen, rejected = garbage.chunk(2)
    module.models.reference = None
    found = module.training_step(replace(batch, ref_chosen=chosen, ref_rejected=rejected))
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    assert_gradients_equal(gradients(module, found), expected_gradients)
    assert garbage.grad is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"beta": 0}, "algo.beta must be above 0, got 0"),
        ({"kind": "slic"}, "algo.kind must be 'sigmoid', 'hinge', 'ipo' or 'robust', got 'slic'"),
        ({"label_smoothing": 0.5}, r"algo.label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1, "kind": "ipo"}, "algo.label_smoothing has no meaning for kind 'ipo'"),
        ({"ipo_sum": True}, "algo.ipo_sum is of algo.kind=ipo and has no effect with sigmoid"),
        ({"batch_size": 0}, "algo.batch_size must be at least 1, got 0"),
    ],
)
def test_arguments_without_a_meaning_are_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        build(DPO, **arguments)

"""The Bradley-Terry loss against TRL's `RewardTrainer`: the same pairs, the same loss, the same gradient."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForSequenceClassification

from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.functional import bradley_terry_loss
from tests.helpers import PAD, build
from tests.pairs import random_pairs, sequences
from tests.peers.trl_peers import assert_agree, assert_differ, ours, policy, preference_trainer, scaled, theirs

pytestmark = pytest.mark.peer
SIDES = ("chosen", "rejected")
MARGINS = (0.5, 0.0, 1.5, 0.25, 2.0, 1.0)

# margin of every pair, the centring coefficient of both
CASES = {"plain": (None, 0.0), "margin": (MARGINS, 0.0), "centred": (None, 0.1), "margin, centred": (MARGINS, 0.1)}
cases = pytest.mark.parametrize(("margins", "centring"), CASES.values(), ids=CASES)


def judge():
    """The policy's trunk with one label, whose rewards are far from equal."""
    causal = policy()
    config = type(causal.config)(**{**causal.config.to_dict(), "num_labels": 1, "pad_token_id": PAD})
    model = LlamaForSequenceClassification(config).double()
    model.model.load_state_dict(causal.model.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.score.weight.copy_(0.3 * torch.randn(model.score.weight.shape, generator=generator))
    return model


def trainer_of(folder, centring, model=None):
    model = judge() if model is None else model
    return preference_trainer("Reward", folder, model, center_rewards_coefficient=centring or None)


def inputs_of(trainer, batch, margins, rows=slice(None)):
    """The pairs as TRL's collator makes a batch of them: prompt and completion in one sequence."""
    columns = (sequences(batch, side) for side in SIDES)
    examples = [{"chosen_ids": c, "rejected_ids": r} for c, r in zip(*columns, strict=True)]
    if margins is not None:
        examples = [{**example, "margin": margin} for example, margin in zip(examples, margins, strict=True)]
    return trainer.data_collator(examples[rows])


def pairs(margins):
    margin = {} if margins is None else {"margin": torch.tensor(margins, dtype=torch.float64)}
    return random_pairs(**margin)


def module_of(centring, **arguments):
    """Our module with the trunk and the head of `judge`."""
    module = build(RewardModeling, center_coef=centring, **arguments)
    with torch.no_grad():
        module.models.value_head.weight.copy_(judge().score.weight[0])
    return module


def by_their_names(found):
    loss, gradient = found
    head = {"score.weight": gradient.pop("value_head.weight").unsqueeze(0)}
    return loss, {**gradient, **head}


@cases
def test_the_loss_of_rewards(margins, centring, tmp_path):
    """Rewards of each sequence on its own, without padding."""
    batch, model = pairs(margins), judge()
    chosen, rejected = (torch.stack([reward(model, ids) for ids in sequences(batch, side)]) for side in SIDES)
    loss = bradley_terry_loss(chosen, rejected, 0.0 if margins is None else batch.margin).mean()
    loss = loss + centring * (chosen + rejected).square().mean()
    loss.backward()
    found = loss.item(), {name: p.grad for name, p in model.named_parameters()}
    trainer = trainer_of(tmp_path, centring)
    assert_agree(found, theirs(trainer, inputs_of(trainer, batch, margins)))


def reward(model, ids):
    hidden = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state
    return model.score(hidden[0, -1])[0]


@cases
def test_the_module(margins, centring, tmp_path):
    batch, module, trainer = pairs(margins), module_of(centring), trainer_of(tmp_path, centring)
    expected = theirs(trainer, inputs_of(trainer, batch, margins))
    assert_agree(by_their_names(ours(module, batch)), expected)

    found, logged = module.pop_metrics(), trainer._metrics["train"]
    assert found["preference_accuracy"] == pytest.approx(logged["accuracy"][-1], abs=1e-6)
    assert found["reward_margin"] == pytest.approx(logged["margin"][-1], rel=1e-5)
    if margins is not None or centring:
        assert_differ(by_their_names(ours(module_of(0.0), random_pairs())), expected)


def test_one_margin_for_all(tmp_path):
    trainer = trainer_of(tmp_path, 0.0)
    expected = theirs(trainer, inputs_of(trainer, random_pairs(), [0.7] * 6))
    assert_agree(by_their_names(ours(module_of(0.0, margin=0.7), random_pairs())), expected)


@cases
def test_two_micro_batches_of_a_step(margins, centring, tmp_path):
    """TRL leaves the division by the number of micro-batches to Trainer, as ours leaves it to Lightning."""
    batch, trainer = pairs(margins), trainer_of(tmp_path, centring)
    parts = [inputs_of(trainer, batch, margins, rows) for rows in (slice(3), slice(3, 6))]
    found = by_their_names(ours(module_of(centring), batch, micro_batches=2))
    assert_agree(found, scaled(theirs(trainer, *parts), 1 / 2))


def test_the_exported_model_goes_on_in_trl(tmp_path):
    """What the module exports has, for TRL, the loss and the gradient of the module itself."""
    module, batch = module_of(0.1), random_pairs()
    trainer = trainer_of(tmp_path, 0.1, model=module.export_model())
    assert_agree(by_their_names(ours(module, batch)), theirs(trainer, inputs_of(trainer, batch, None)))


@pytest.mark.parametrize(
    ("rewards", "margin", "centring", "expected"),
    [
        ((2.0, 0.0), None, 0.0, 0.1269280),
        ((2.0, 0.0), 1.0, 0.0, 0.3132617),
        ((2.0, 1.0), None, 0.01, 0.4032617),
    ],
)
def test_the_worked_examples(rewards, margin, centring, expected, tmp_path):
    """C12, by both sides."""
    trainer = trainer_of(tmp_path, centring)
    logits = torch.tensor(rewards, dtype=torch.float64).unsqueeze(1)
    inputs = {"attention_mask": torch.ones(2, 1)} | ({} if margin is None else {"margin": torch.tensor([margin])})
    found = trainer.compute_loss(lambda **_: SimpleNamespace(logits=logits), inputs).item()
    assert found == pytest.approx(expected, abs=1e-6)
    mine = bradley_terry_loss(*logits, margin=margin or 0.0) + centring * logits.sum().square()
    assert mine.item() == pytest.approx(expected, abs=1e-6)


def test_a_temperature_has_no_peer_in_trl():
    """It divides the difference and the margin: C12's number."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert bradley_terry_loss(2 * one, zero, margin=1.0, temperature=0.5).item() == pytest.approx(0.1269280, abs=1e-6)

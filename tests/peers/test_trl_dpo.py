"""DPO and its relatives against TRL's `DPOTrainer`: the same pairs, the same loss, the same gradient."""

from types import SimpleNamespace

import pytest
import torch

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.functional import dpo_loss
from lit_rlhf.models.scoring import score
from tests.helpers import build
from tests.pairs import random_pairs
from tests.peers.trl_peers import (
    assert_agree,
    assert_differ,
    ours,
    policy,
    preference_trainer,
    reference,
    scaled,
    theirs,
    with_trl_reference,
)

pytestmark = pytest.mark.peer

# TRL's configuration, our arguments
KINDS = {
    "sigmoid": ({"loss_type": "sigmoid"}, {}),
    "hinge": ({"loss_type": "hinge"}, {"kind": "hinge"}),
    "ipo": ({"loss_type": "ipo"}, {"kind": "ipo"}),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.1}, {"kind": "robust", "label_smoothing": 0.1}),
}
kinds = pytest.mark.parametrize(("config", "arguments"), KINDS.values(), ids=KINDS)
betas = pytest.mark.parametrize("beta", [0.1, 0.5])


def trainer_of(folder, **config):
    return preference_trainer("DPO", folder, policy(), ref_model=reference(), **config)


def examples(batch):
    """The pairs as TRL's collator takes them: token ids, not padded."""
    columns = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    return [
        {name: getattr(batch, name)[i][getattr(batch, f"{side}_mask")[i]].tolist() for name, side in columns.items()}
        for i in range(len(batch))
    ]


def log_ratios(batch, per_token):
    """`[N]` of the chosen and of the rejected completions, by our scoring path; and the policy."""
    model, rows = policy(), batch.completions()
    h = (score(model, rows).logprobs - score(reference(), rows).logprobs.detach()).sum(1)
    h = h / rows.response_mask.sum(1) if per_token else h
    return *h.chunk(2), model


@betas
@kinds
def test_the_loss_of_log_ratios(config, arguments, beta, tmp_path):
    batch = random_pairs()
    chosen, rejected, model = log_ratios(batch, per_token=config["loss_type"] == "ipo")
    loss = dpo_loss(chosen, rejected, beta, **arguments).mean()
    loss.backward()
    found = loss.item(), {name: p.grad for name, p in model.named_parameters()}
    trainer = trainer_of(tmp_path, beta=beta, **config)
    assert_agree(found, theirs(trainer, trainer.data_collator(examples(batch))))


@betas
@kinds
def test_the_module(config, arguments, beta, tmp_path):
    batch, module = random_pairs(), with_trl_reference(build(DPO, beta=beta, **arguments))
    trainer = trainer_of(tmp_path, beta=beta, **config)
    assert_agree(ours(module, batch), theirs(trainer, trainer.data_collator(examples(batch))))

    found, expected = module.pop_metrics(), trainer._metrics["train"]
    if config["loss_type"] != "ipo":  # whose rewards TRL reports of the sum and ours of the mean, which the loss sees
        assert found["chosen_reward"] == pytest.approx(expected["rewards/chosen"][-1], rel=1e-5)
        assert found["reward_margin"] == pytest.approx(expected["rewards/margins"][-1], rel=1e-5)
        assert found["preference_accuracy"] == pytest.approx(expected["rewards/accuracies"][-1], abs=1e-6)


@kinds
def test_two_micro_batches_of_a_step(config, arguments, tmp_path):
    """TRL leaves the division by the number of micro-batches to Trainer, as ours leaves it to Lightning."""
    batch, module = random_pairs(), with_trl_reference(build(DPO, **arguments))
    trainer, pairs = trainer_of(tmp_path, **config), examples(batch)
    expected = theirs(trainer, trainer.data_collator(pairs[:3]), trainer.data_collator(pairs[3:]))
    assert_agree(ours(module, batch, micro_batches=2), scaled(expected, 1 / 2))


@betas
def test_some_pairs_lie_beyond_the_hinge(beta):
    chosen, rejected, _ = log_ratios(random_pairs(), per_token=False)
    flat = dpo_loss(chosen, rejected, beta, kind="hinge") == 0
    assert flat.any() == (beta == 0.5)
    assert not flat.all()


# Where TRL is not an oracle: the numbers of C11


def with_logprobs(chosen, rejected):
    """A model of which only this is known: the log-probs of a completion of 5 tokens and of one of 4."""
    logprobs = torch.zeros(2, 6, dtype=torch.float64)
    logprobs[0, 1:], logprobs[1, 1:5] = chosen / 5, rejected / 4
    zero = torch.zeros_like(logprobs)
    found = SimpleNamespace(log_probs=logprobs, entropy=zero, mean_logits=zero, is_top1=zero.bool())
    return lambda **inputs: found


def trl_number(folder, **config):
    """TRL's loss of log-probs -10 and -12 under the policy, -11 and -11.5 under the reference."""
    trainer = trainer_of(folder, beta=0.1, **config)
    trainer.ref_model = with_logprobs(-11.0, -11.5)
    inputs = trainer.data_collator(examples(random_pairs((5,), (4,), (2,))))
    return trainer.compute_loss(with_logprobs(-10.0, -12.0), inputs).item()


def our_number(per_token=False, **arguments):
    h = torch.tensor([[1.0], [-0.5]], dtype=torch.float64) / (torch.tensor([[5], [4]]) if per_token else 1)
    return dpo_loss(*h, beta=0.1, **arguments).item()


@pytest.mark.parametrize(
    ("name", "expected"), [("sigmoid", 0.6209570), ("hinge", 0.85), ("ipo", 21.855625), ("robust", 0.6022070)]
)
def test_the_worked_example(name, expected, tmp_path):
    config, arguments = KINDS[name]
    assert trl_number(tmp_path, **config) == pytest.approx(expected, abs=1e-6)
    assert our_number(per_token=name == "ipo", **arguments) == pytest.approx(expected, abs=1e-6)


def test_trls_sigmoid_ignores_label_smoothing(tmp_path):
    """So that conservative DPO has no peer in TRL: ours is checked against the number of its note, 0.6359570."""
    config = {"loss_type": "sigmoid", "label_smoothing": 0.1}
    assert trl_number(tmp_path, **config) == pytest.approx(0.6209570, abs=1e-6)  # as without
    assert our_number(label_smoothing=0.1) == pytest.approx(0.6359570, abs=1e-6)

    batch, trainer = random_pairs(), trainer_of(tmp_path, **config)
    expected = theirs(trainer, trainer.data_collator(examples(batch)))
    assert_agree(ours(with_trl_reference(build(DPO)), batch), expected)
    assert_differ(ours(with_trl_reference(build(DPO, label_smoothing=0.1)), batch), expected)


def test_the_ipo_paper_sums_over_tokens(tmp_path):
    """TRL has the mean, after asking the authors, as ours has; the paper's own number is 12.25, by `ipo_sum`."""
    assert trl_number(tmp_path, loss_type="ipo") == pytest.approx(21.855625, abs=1e-6)
    assert our_number(kind="ipo") == pytest.approx(12.25, abs=1e-9)

    batch, trainer = random_pairs(), trainer_of(tmp_path, loss_type="ipo")
    expected = theirs(trainer, trainer.data_collator(examples(batch)))
    assert_differ(ours(with_trl_reference(build(DPO, kind="ipo", ipo_sum=True)), batch), expected)

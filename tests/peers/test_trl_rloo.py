"""RLOO against TRL's `RLOOTrainer`: advantages, the clipped sequence ratio, and the score function at ratio 1."""

import math

import pytest
import torch

from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.functional import leave_one_out
from lit_rlhf.registry import get_policy_loss
from lit_rlhf.types import SamplingConfig
from tests.helpers import build
from tests.peers.trl_peers import (
    GROUP_SIZE,
    LONGEST,
    assert_agree,
    assert_differ,
    experience,
    in_parts,
    neighbour,
    ours,
    policy,
    replaced,
    rows,
    scaled,
    scored,
    theirs,
    trainer_of,
    with_trl_reference,
)

pytestmark = pytest.mark.peer
REWARDS = (1.5, 0.75, 0.625, 1.375, -0.125, -2.0)  # the rows' losses do not cancel: TRL sums log-probs in float32
SEVERAL_UPDATES = {"policy_loss": "sequence_clip", "loss_agg": "seq-mean-token-mean"}


def both(tmp_path, beta=0.0, micro_batches=1, update=True, rewards=REWARDS, bounds=(), **arguments):
    """Our rows and module, TRL's inputs and trainer: an old policy's rollout, scored by it.

    With `update` the weights are then others than those that sampled, without they are still the same.
    """
    before = neighbour(seed=9).state_dict()
    epsilons = dict(zip(("epsilon", "epsilon_high"), bounds, strict=False))
    trainer = trainer_of("RLOO", tmp_path, micro_batches=micro_batches, beta=beta, **epsilons)
    module = build(RLOO, group_size=GROUP_SIZE, kl_coef=beta, **arguments)
    if beta:
        with_trl_reference(module)
    batch = replaced(rows(), rewards=torch.tensor(rewards, dtype=torch.float64))
    models = (trainer.model, module.models.policy)
    for model in models:
        model.load_state_dict(before)
    inputs = scored(trainer, batch)
    old = module.models.score(batch).logprobs.detach()
    batch = experience(module, replaced(batch, old_logprobs=old))
    for model in models:
        model.load_state_dict(policy().state_dict() if update else before)
    return batch, module, inputs, trainer


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_clipped_sequence_ratio(beta, micro_batches, tmp_path):
    """TRL leaves the division by the number of micro-batches to Trainer, as ours leaves it to Lightning."""
    batch, module, inputs, trainer = both(tmp_path, beta, micro_batches, **SEVERAL_UPDATES)
    expected = theirs(trainer, *in_parts(inputs, micro_batches))
    assert_agree(ours(module, batch, micro_batches), scaled(expected, 1 / micro_batches))
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert 0 < sum(trainer._metrics["train"][name]) < micro_batches


def test_other_bounds(tmp_path):
    def clip(old_logp, logp, advantages, mask):
        return get_policy_loss("sequence_clip")(old_logp, logp, advantages, mask, 0.05, 0.4)

    arguments = {**SEVERAL_UPDATES, "policy_loss": clip}
    batch, module, inputs, trainer = both(tmp_path, bounds=(0.05, 0.4), **arguments)
    expected = theirs(trainer, inputs)
    assert_agree(ours(module, batch), expected)
    batch, module, *_ = both(tmp_path, **SEVERAL_UPDATES)
    assert_differ(ours(module, batch), expected)


@pytest.mark.parametrize(
    ("arguments", "constant"),
    [
        ({"loss_agg": "seq-mean-token-sum"}, 1),
        ({"loss_agg": "seq-mean-token-sum-norm", "sampling": SamplingConfig(max_new_tokens=LONGEST)}, 1 / LONGEST),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_papers_form_is_trls_at_ratio_1(beta, arguments, constant, tmp_path):
    """The paper's loss is -A log pi and TRL's -rho A: other values, and one gradient until the first update."""
    batch, module, inputs, trainer = both(tmp_path, beta, update=False, **arguments)
    loss, gradient = ours(module, batch)
    score_function = -(batch.advantages * batch.old_logprobs)[batch.response_mask].sum() / 6 * constant
    assert loss == pytest.approx(float(score_function), rel=1e-9)
    trl_loss, trl_gradient = scaled(theirs(trainer, inputs), constant)
    assert trl_loss == pytest.approx(-constant * float(inputs["advantages"].mean()), abs=1e-6)
    assert_agree((1.0, gradient), (1.0, trl_gradient))

    batch, module, inputs, trainer = both(tmp_path, beta, **arguments)
    assert_differ((1.0, ours(module, batch)[1]), (1.0, scaled(theirs(trainer, inputs), constant)[1]))


GROUPS = {
    "uneven": [1.0, 0.25, -0.5, 0.5, 2.0, 0.125],
    "one group equal": [0.5, 0.5, 0.5, 0.0, 1.0, 0.0],
    "one not scorable": [1.0, math.nan, -0.5, 0.5, 2.0, 0.125],
}


@pytest.mark.parametrize("rewards", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_advantages(beta, rewards, tmp_path):
    """With a KL in the reward: that of the whole completion, by the policy that sampled it."""
    batch, _, inputs, _ = both(tmp_path, beta, rewards=rewards)
    expected = inputs["advantages"].double()
    torch.testing.assert_close(batch.advantages[:, 0], expected, rtol=1e-5, atol=2e-6)
    if not beta:
        found = leave_one_out(torch.tensor(rewards, dtype=torch.float64), batch.group_ids)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_the_worked_example_of_a_kl_in_the_reward(tmp_path):
    """Scores 1 and 0, KL of the sequences 0.2 and 0.4, beta 0.05: A = +-1.01 (C21), by both sides."""
    trainer = trainer_of("RLOO", tmp_path, beta=0.05, num_generations=2, per_device_train_batch_size=2)
    batch = rows()[:2]
    batch = replaced(batch, rewards=torch.tensor([1.0, 0.0], dtype=torch.float64))
    kl = batch.response_mask * torch.tensor([[0.2], [0.4]]) / batch.response_mask.sum(1, keepdim=True)
    known = {id(trainer.model): kl, id(trainer.ref_model): torch.zeros_like(kl)}
    trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (known[id(model)], None, None)
    assert scored(trainer, batch)["advantages"].tolist() == pytest.approx([1.01, -1.01], abs=1e-6)

    module = build(RLOO, group_size=2, kl_coef=0.05)
    found = module.experience(replaced(batch, old_logprobs=kl.double(), ref_logprobs=torch.zeros_like(kl).double()))
    assert found.advantages[:, 0].tolist() == pytest.approx([1.01, -1.01], abs=1e-6)

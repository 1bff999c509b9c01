"""One batch, any split into micro-batches: the same gradient, the same metrics (C28)."""

import math
from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from tests.algorithms.settings import (
    AGGREGATIONS,
    ON_POLICY,
    SPLITS,
    assert_stats_equal,
    loss_gradients_stats,
    module_of,
    rows_for,
    setting,
    setting_or_sft,
    split,
    take_stats,
)
from tests.helpers import (
    as_completions,
    assert_gradients_equal,
    build,
    gradients,
    pretend_trainer,
    random_experience,
)

WITH_AN_EMPTY_ROW = (3, 7, 0, 5, 2, 6)  # "one by one", it is a micro-batch of its own


def assert_same_step(module, whole, parts):
    """The parts make the step that the whole makes, with Lightning's division undone."""
    loss, expected, stats = loss_gradients_stats(module, whole)

    pretend_trainer(module, accumulate=len(parts))
    module.begin_step(parts)
    losses = [module.training_step(part) / len(parts) for part in parts]
    found, found_stats = gradients(module, *losses), take_stats(module)

    assert sum(losses).item() == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)
    assert_stats_equal(found_stats, stats)


EVERY_WAY = [(name, "uneven") for name in ON_POLICY]
EVERY_WAY += [(name, way) for name in ("GRPO", "PPO", "ConservativePPO") for way in ("even", "one by one")]


@pytest.mark.parametrize(("name", "way"), EVERY_WAY)
def test_any_split_into_micro_batches_gives_the_same_gradient(name, way):
    module = module_of(name)
    batch = rows_for(name, module.models.policy, WITH_AN_EMPTY_ROW)
    assert_same_step(module, batch, split(batch, SPLITS[way]))


@pytest.mark.parametrize("parts", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
def test_any_split_gives_the_same_gradient_under_any_aggregation(loss_agg, parts):
    name = "DAPO"
    module = module_of(name, loss_agg=loss_agg)
    batch = rows_for(name, module.models.policy, WITH_AN_EMPTY_ROW)
    assert_same_step(module, batch, split(batch, parts))


@pytest.mark.parametrize("parts", SPLITS.values(), ids=SPLITS)
def test_any_split_of_demonstrations_gives_the_same_gradient(parts):
    module = build(SFT)
    batch = as_completions(random_experience(lengths=WITH_AN_EMPTY_ROW))
    loss, expected, _ = loss_gradients_stats(module, batch)

    found_loss, found, _ = loss_gradients_stats(module, *split(batch, parts))

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)


@pytest.mark.parametrize("name", [*ON_POLICY, "SFT"])
def test_the_loss_undoes_what_lightning_and_ddp_divide_by(name):
    module, batch = setting_or_sft(name)
    whole, _, stats = loss_gradients_stats(module, batch)
    parts = split(batch, SPLITS["uneven"])

    pretend_trainer(module, accumulate=3, world_size=2)
    module.begin_step(parts)
    losses = [module.training_step(part).item() for part in parts]

    if name.startswith("Conservative"):  # whose penalty is no sum: each of the two ranks adds half of its value
        assert stats["loss/kl_penalty"] > 1e-3
        whole -= stats["loss/kl_penalty"] / 2
    assert sum(losses) / 3 / 2 == pytest.approx(whole, abs=1e-12)
    # three micro-batches of one of two ranks: the mean of what was recorded, halved, is the step's loss
    assert take_stats(module)["loss/loss"] / 2 == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("name", [*ON_POLICY, "SFT"])
def test_without_counts_a_batch_is_one_of_the_steps_micro_batches(name):
    module, batch = setting_or_sft(name)
    whole = module.training_step(batch).item()
    pretend_trainer(module, accumulate=4)
    assert module.training_step(batch).item() == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("name", ON_POLICY)
def test_a_step_without_any_valid_token_has_a_loss_and_gradients_of_zero(name, counted):
    module = module_of(name)
    batch = rows_for(name, module.models.policy)
    batch = replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    batches = split(batch, SPLITS["uneven"]) if counted else [batch]

    loss, found, stats = loss_gradients_stats(module, *batches)

    assert loss == 0.0
    assert set(found) == {name for name, p in module.models.named_parameters() if p.requires_grad}
    assert all((gradient == 0).all() for gradient in found.values())
    assert all(math.isfinite(value) for value in stats.values())


def test_demonstrations_without_any_valid_token_have_gradients_of_zero():
    module, batch = build(SFT), as_completions(random_experience(lengths=(0, 0), prompt_lengths=(1, 3)))
    loss, found, _ = loss_gradients_stats(module, *split(batch, [[0], [1]]))
    assert loss == 0.0
    assert all((gradient == 0).all() for gradient in found.values())


# rows that may be left out


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("policy_loss", ["clip", "gspo", "gspo_token", "sequence_clip", "cispo", "reinforce"])
def test_rows_without_an_advantage_can_be_left_out_of_the_update(policy_loss, loss_agg):
    module, batch = setting("GRPO stale", kl_coef=0, entropy_coef=0, policy_loss=policy_loss, loss_agg=loss_agg)
    idle = torch.tensor([True, False, True, False, False, True])
    advantages = torch.where(idle.unsqueeze(1), 0.0, batch.advantages)
    tokens, rows = batch.response_mask.sum(), batch.response_mask.any(1).sum()
    batch = replace(batch, advantages=advantages, step_tokens=tokens, step_rows=rows)
    loss, expected, _ = loss_gradients_stats(module, batch)

    short = batch.with_signal()
    assert len(short) == 3
    found_loss, found, _ = loss_gradients_stats(module, short)

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)


def test_a_batch_without_any_advantage_keeps_a_row_whose_gradient_is_zero():
    module, batch = setting("GRPO", kl_coef=0, entropy_coef=0)
    short = replace(batch, advantages=batch.advantages.new_zeros(batch.advantages.shape)).with_signal()
    assert len(short) == 1
    assert all((g == 0).all() for g in gradients(module, module.training_step(short)).values())


@pytest.mark.parametrize(
    ("name", "arguments", "skips"),
    [
        ("GRPO", {"kl_coef": 0, "entropy_coef": 0}, True),
        ("GRPO", {"kl_coef": 0.1, "kl_in": "reward", "entropy_coef": 0}, True),
        ("GRPO", {"kl_coef": 0.1, "entropy_coef": 0}, False),
        ("GRPO", {"kl_coef": 0, "entropy_coef": 0.1}, False),
        ("GSPO", {"kl_coef": 0, "entropy_coef": 0}, True),
        ("CISPO", {"kl_coef": 0, "entropy_coef": 0}, True),
        ("REINFORCE", {"kl_coef": 0, "entropy_coef": 0}, True),
        ("PPO", {"kl_coef": 0, "entropy_coef": 0}, False),
        ("ConservativePPO", {"kl_coef": 0, "entropy_coef": 0}, False),
        ("GRPO", {"kl_coef": 0, "entropy_coef": 0, "policy_loss": lambda old, new, adv, mask: (new, {})}, False),
    ],
)
def test_no_row_is_left_out_of_a_term_that_acts_on_all(name, arguments, skips):
    assert module_of(name, skip_zero_advantage=True, **arguments).skip_zero_advantage == skips
    assert not module_of(name, **arguments).skip_zero_advantage


def test_no_row_is_left_out_of_a_loss_that_a_subclass_adds_to():
    class WithATermOfItsOwn(GRPO):
        def compute_loss(self, scores, batch):
            return {**super().compute_loss(scores, batch), "length_loss": scores.logprobs.mean()}

    assert not build(WithATermOfItsOwn, skip_zero_advantage=True).skip_zero_advantage

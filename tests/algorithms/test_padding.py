"""What is not a token, and where a row stands, does not matter (C26, C27)."""

from dataclasses import fields, replace

import pytest
import torch

from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import Experience
from tests.algorithms.settings import (
    AGGREGATIONS,
    ON_POLICY,
    assert_stats_equal,
    loss_gradients_stats,
    module_of,
    rollout_from,
    rows_for,
    setting,
    setting_or_sft,
)
from tests.helpers import assert_gradients_equal, with_columns

ORDER = torch.tensor([4, 1, 5, 0, 3, 2])


def nan_columns(batch, left=0, right=0):
    padded = with_columns(batch, left, right)
    assert not isinstance(batch, Experience) or padded.advantages.isnan().any() == (right > 0)
    return padded


EVERY_SIDE = [(name, 2, 3) for name in (*ON_POLICY, "SFT")]
EVERY_SIDE += [(name, *sides) for name in ("GRPO", "PPO", "SFT") for sides in ((3, 0), (0, 4))]


@pytest.mark.parametrize(("name", "left", "right"), EVERY_SIDE)
def test_padding_columns_of_nan_change_nothing(name, left, right):
    module, batch = setting_or_sft(name)
    loss, expected, stats = loss_gradients_stats(module, batch)
    found_loss, found, found_stats = loss_gradients_stats(module, nan_columns(batch, left, right))
    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)
    assert_stats_equal(found_stats, stats)


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_padding_columns_change_no_aggregation_and_no_estimate(loss_agg, estimator):
    module, batch = setting("GRPO", loss_agg=loss_agg, kl_estimator=estimator)
    loss, expected, _ = loss_gradients_stats(module, batch)
    found_loss, found, _ = loss_gradients_stats(module, nan_columns(batch, 2, 3))
    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("name", ["GRPO", "DAPO"])
def test_gradients_of_masked_cells_are_zero_even_where_everything_is_nan(name, loss_agg):
    module, batch = setting(name, loss_agg=loss_agg)
    batch = nan_columns(batch, right=2)
    logprobs = batch.old_logprobs.nan_to_num().add(0.1).requires_grad_()
    entropy = torch.rand_like(logprobs).requires_grad_()

    sum(module.compute_loss(Scores(logprobs, entropy), batch).values()).backward()

    for gradient in (logprobs.grad, entropy.grad):
        assert (gradient[~batch.response_mask] == 0).all()
        assert (gradient[batch.response_mask] != 0).any()
        assert gradient.isfinite().all()


def rollout_experience(module, rollout):
    """What `collect` makes of samples, from a fresh state of the loop."""
    module.loop.numbers.clear()
    module.stats.reset()
    return module.experience(module.score_rollout(rollout))


def shaped(name, **changes):
    """A module whose KL is in the reward and adapts, whose truncated rows bootstrap and cost; and its samples."""
    rewarding = {"kl_coef": 0.3, "kl_in": "reward", "kl_estimator": None, "kl_unbiased": False, "kl_target": 0.1}
    module = module_of(name, truncation_penalty=0.2, **rewarding, **changes)
    rows = rows_for(name, module.models.policy)
    if module.value != "none":
        module.critic.bootstraps = True
    return module, rollout_from(rows)


@pytest.mark.parametrize("name", ON_POLICY)
def test_padding_columns_change_nothing_that_a_rollout_computes(name):
    module, rollout = shaped(name)
    T = rollout.response_mask.shape[1]
    expected = rollout_experience(module, rollout)
    coefficient = module.loop.numbers.copy()

    found = rollout_experience(module, with_columns(rollout, 2, 3))

    assert module.loop.numbers == pytest.approx(coefficient, rel=1e-12)
    assert (expected.advantages != 0).any()
    for field in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
        before, after = getattr(expected, field), getattr(found, field)
        assert (before is None) == (after is None)
        if before is not None:
            torch.testing.assert_close(
                after[:, :T][rollout.response_mask], before[rollout.response_mask], atol=1e-9, rtol=0
            )
    assert (found.advantages[:, T:] == 0).all()
    assert found.bootstrap is None or (found.bootstrap - expected.bootstrap).abs().max() < 1e-9


@pytest.mark.parametrize("name", [*ON_POLICY, "SFT"])
def test_the_order_of_the_rows_does_not_matter(name):
    module, batch = setting_or_sft(name)
    loss, expected, stats = loss_gradients_stats(module, batch)

    found_loss, found, found_stats = loss_gradients_stats(module, batch[ORDER])

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)
    assert_stats_equal(found_stats, stats)


@pytest.mark.parametrize("name", ON_POLICY)
def test_advantages_follow_their_rows_however_groups_are_numbered(name):
    module, rollout = shaped(name)
    shuffled = rollout[ORDER]
    renamed = replace(shuffled, group_ids=torch.tensor([900, -3, 40])[shuffled.group_ids])

    expected = rollout_experience(module, rollout)
    before = module.loop.numbers.copy()
    found = rollout_experience(module, renamed)

    assert module.loop.numbers == pytest.approx(before, rel=1e-12)
    assert (expected.advantages != 0).any()
    for field in fields(Experience):
        value = getattr(expected, field.name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            mask = expected.response_mask[ORDER] if value.shape == expected.response_mask.shape else ...
            torch.testing.assert_close(getattr(found, field.name)[mask], value[ORDER][mask], atol=1e-9, rtol=0)

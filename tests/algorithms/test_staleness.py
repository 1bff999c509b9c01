"""Rows that older weights sampled: rescored, weighed once, counted; rows of now are left alone (C10)."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.cispo import CISPO
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.registry import register_policy_loss
from lit_rlhf.rollouts.importance import ImportanceCorrection
from lit_rlhf.rollouts.replay import ReplayBuffer
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import first_is_even
from tests.algorithms.settings import other_weights, rollout_from, rows_for, take_stats
from tests.algorithms.toys import rollout_of
from tests.helpers import build, plain_logprobs, pretend_trainer, prompt_rows, prompts, random_experience, trainer

NOW = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64).log().unsqueeze(0)  # log w of C10, behaviour at 0


def rows_of_age(*ages, behavior=None):
    """One row per age with the log-ratios of C10; what an update needs to know of them."""
    behavior = torch.zeros(len(ages), 3, dtype=torch.float64) if behavior is None else behavior
    rollout = rollout_of([0.0] * len(ages), [3] * len(ages), behavior_logprobs=behavior)
    rows = build(GRPO).experience(replace(rollout, group_ids=torch.arange(len(ages))))
    return replace(rows, staleness=torch.tensor(ages))


def corrected(level, ages, behavior=None, **arguments):
    rows = rows_of_age(*ages, behavior=behavior)
    weights, cells = ImportanceCorrection(level, **arguments)(NOW.expand(len(ages), 3), rows)
    module = build(GRPO)
    module.count(cells)
    return weights, {name.split("/")[1]: value for name, value in take_stats(module).items()}


def test_the_worked_numbers_of_a_stale_row():
    weights, stats = corrected("token", [3])
    assert weights[0].tolist() == pytest.approx([0.4851495, 0.970299, 1.940598], abs=1e-7)
    assert stats["ess"] == pytest.approx(0.4920635, abs=1e-7)  # raw; of the clipped ones it would be .7777778
    assert stats["clipped_fraction"] == pytest.approx(2 / 3, abs=1e-7)
    assert stats["is_ratio_mean"] == pytest.approx(6.2 / 3, abs=1e-9)
    assert (stats["is_ratio_min"], stats["is_ratio_max"]) == pytest.approx((0.2, 5.0))
    assert stats["behavior_kl"] == pytest.approx(0.0, abs=1e-9)  # mean of lp_b - lp, and .2 * 5 = 1


def test_the_sign_of_the_behaviours_kl():
    _, stats = corrected("token", [1], behavior=NOW + torch.tensor([[0.1, 0.2, 0.6]], dtype=torch.float64))
    assert stats["behavior_kl"] == pytest.approx(0.3, abs=1e-9)


def test_by_sequence_the_weight_is_that_of_the_product():
    log_ratio = torch.tensor([[0.2, -0.1, 0.3]], dtype=torch.float64)
    weights, stats = corrected("sequence", [0], behavior=NOW - log_ratio)
    assert weights[0].tolist() == pytest.approx([1.4918247] * 3, abs=1e-7)
    assert stats["is_ratio_mean"] == pytest.approx(1.4918247, abs=1e-7)
    assert stats["ess"] == pytest.approx(1)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sum_of_log_probs_is_corrected_by_sequence(level):
    """Signal's format: one number per row."""
    log_ratio = torch.tensor([0.2 - 0.1 + 0.3, 5.0], dtype=torch.float64)
    behavior = NOW.sum() - log_ratio
    weights, stats = corrected(level, [0, 0], behavior, importance_clip_min=0.1, importance_clip_max=10.0)
    assert weights[:, 0].tolist() == pytest.approx([1.4918247, 10.0], abs=1e-6)
    assert (weights == weights[:, :1]).all()
    assert stats["clipped_fraction"] == 0.5
    assert "behavior_kl" not in stats


@pytest.mark.parametrize("level", ["auto", "token", "sequence"])
def test_on_its_own_only_stale_rows_are_weighed_and_counted(level):
    weights, stats = corrected(level, [0, 2, 0])
    on_policy = weights[torch.tensor([0, 2])]
    if level == "auto":
        assert (on_policy == 1).all()
        assert weights[1].tolist() == pytest.approx([0.5 * 0.99**2, 0.99**2, 2 * 0.99**2], abs=1e-9)
        assert stats["is_ratio_mean"] == pytest.approx(6.2 / 3)
        alone = corrected(level, [2])[1]
        assert stats == pytest.approx(alone)
    else:
        assert (on_policy == on_policy[0]).all()
        counted = 3 if level == "sequence" else 9
        assert stats["ess"] == pytest.approx(corrected(level, [0] * counted)[1]["ess"])


def test_without_a_stale_row_all_weigh_one_and_nothing_is_counted():
    weights, stats = corrected("auto", [0, 0])
    assert (weights == 1).all()
    assert not [name for name in stats if name in ("is_ratio_mean", "ess", "clipped_fraction", "behavior_kl")]
    assert corrected("none", [0, 3]) == (None, {})
    rows = replace(rows_of_age(0), staleness=None)
    assert ImportanceCorrection("auto")(NOW, rows) == (None, {})


def test_masked_cells_weigh_nothing():
    nan = float("nan")
    behavior = torch.zeros(2, 3, dtype=torch.float64)
    behavior[0, 2], behavior[1] = nan, nan
    rows = rows_of_age(1, 1)
    mask = torch.tensor([[True, True, False], [False] * 3])
    rows = replace(rows, behavior_logprobs=behavior, response_mask=mask)
    for level, mean in (("token", 0.6), ("sequence", 0.2)):
        weights, cells = ImportanceCorrection(level)(NOW.expand(2, 3), rows)
        module = build(GRPO)
        module.count(cells)
        assert weights.isfinite().all()
        assert take_stats(module)["stability/is_ratio_mean"] == pytest.approx(mean)


@pytest.mark.parametrize(
    "arguments",
    [{"importance_clip_max": 0.9}, {"importance_clip_min": 3.0}, {"staleness_decay": 1.5}, {"staleness_decay": 0.0}],
)
def test_bounds_that_cannot_be_are_refused(arguments):
    with pytest.raises(InputError, match=r"algo\.(importance_clip|staleness_decay)"):
        build(GRPO, **arguments)


# from which policy a loss starts


@register_policy_loss("test_half_score", ratio=False)
def half_score(old_logp, logp, advantages, mask):
    return -0.5 * advantages * logp, {}


@pytest.mark.parametrize(
    ("algorithm", "arguments", "has_ratio"),
    [
        (GRPO, {}, True),
        (PPO, {"value": "shared"}, True),
        (GSPO, {}, True),
        (CISPO, {}, True),
        (RLOO, {"policy_loss": "sequence_clip"}, True),
        (GRPO, {"policy_loss": lambda old_logp, logp, advantages, mask: (-logp * advantages, {})}, True),
        (RLOO, {}, False),
        (REINFORCE, {}, False),
        (ImportanceSampling, {}, False),
        (GRPO, {"policy_loss": "test_half_score"}, False),
        (GRPO, {"policy_loss": "tests.algorithms.test_staleness.half_score"}, False),
    ],
)
def test_what_the_loss_corrects_itself_is_not_corrected_again(algorithm, arguments, has_ratio):
    """From pi_b to pi_old where the loss has a ratio to pi_old, to pi where it has none."""
    module = build(algorithm, **arguments)
    rows = replace(rows_for("", module.models.policy), staleness=torch.full((6,), 2))
    module.training_step(rows)
    now = plain_logprobs(module.models.policy, rows)
    start = rows.old_logprobs if has_ratio else now
    raw = (start - rows.behavior_logprobs)[rows.response_mask].exp()
    assert take_stats(module)["stability/is_ratio_mean"] == pytest.approx(float(raw.mean()), abs=1e-9)


# in a rollout


@pytest.mark.parametrize("level", ["auto", "token", "none"])
def test_old_log_probs_of_stale_rows_are_those_of_the_weights_now(level):
    module = build(GRPO, importance_correction=level)
    rows = random_experience(model=module.models.policy)
    sampler = rows.behavior_logprobs
    module.loop.iteration = 3
    rollout = replace(rollout_from(rows), old_logprobs=sampler, version=torch.tensor([3, 1, 3, 2, 3, 3]))

    experience = module.experience(module.score_rollout(rollout))

    assert experience.staleness.tolist() == [0, 2, 0, 1, 0, 0]
    stale, mask = (experience.staleness > 0).unsqueeze(1), rows.response_mask
    expected = torch.where(stale & (level != "none"), plain_logprobs(module.models.policy, rows), sampler)
    torch.testing.assert_close(experience.old_logprobs[mask], expected[mask], atol=1e-9, rtol=0)
    torch.testing.assert_close(experience.behavior_logprobs[mask], sampler[mask], atol=0, rtol=0)


def watched(algorithm, seen, **arguments):
    class Watched(algorithm):
        def training_step(self, batch, batch_idx=0):
            seen.append(batch)
            weights, _ = self.importance(batch.old_logprobs, batch)
            self.weights.append(weights)
            return super().training_step(batch, batch_idx)

        def publish(self, stats, extra=None):
            self.rows.append({name: float(value) for name, value in stats.compute().items()})
            super().publish(stats, extra)

    sizes = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=4), "lr": 1e-2}
    module = build(Watched, reward_funcs=[first_is_even], **{**sizes, **arguments})
    module.weights, module.rows = [], []
    return module


def test_what_dapo_carries_over_is_weighed_and_the_rest_is_not():
    seen = []
    module = watched(DAPO, seen, max_rounds=3)
    trainer(epochs=4).fit(module, datamodule=RowsDataModule(prompt_rows(32)))
    ages = torch.cat([batch.staleness for batch in seen])
    assert {0, 1} == set(ages.tolist())
    for batch, weights, row in zip(seen, module.weights, module.rows, strict=True):
        fresh = batch.staleness == 0
        assert (weights[fresh] == 1).all()
        assert (weights[~fresh][batch.response_mask[~fresh]] != 1).all()
        assert (weights[~fresh] <= 2 * 0.99).all()
        assert ("stability/is_ratio_mean" in row) == bool((~fresh & batch.response_mask.any(1)).any())


def test_on_fresh_rollouts_nothing_is_weighed():
    module = watched(GRPO, [])
    trainer(epochs=3).fit(module, datamodule=RowsDataModule(prompt_rows(32)))
    assert all((weights == 1).all() for weights in module.weights)
    assert not any("stability/is_ratio_mean" in row for row in module.rows)


def test_replayed_rows_are_as_old_as_they_are():
    seen = []
    module = watched(ImportanceSampling, seen, buffer_size=3, min_staleness=1)
    trainer(epochs=6).fit(module, datamodule=RowsDataModule(prompt_rows(64)))
    ages = [batch.staleness for batch in seen]
    assert [int(age.min()) for age in ages] == [0, 1, 1, 1, 1, 1]
    assert max(int(age.max()) for age in ages) == 2
    assert [row["rollout/staleness_max"] for row in module.rows] == [float(age.max()) for age in ages]
    for i, (batch, age) in enumerate(zip(seen, ages, strict=True)):
        assert (batch.version == i - age).all()
        assert len(batch) == 8
        assert len(set(batch.group_ids.tolist())) == 4


def test_every_rollout_every_rank_and_every_seed_draws_anew():
    seeds = []

    class Recorded(ReplayBuffer):
        def draw(self, groups, min_age, *seed):
            seeds.append(seed)
            return super().draw(groups, min_age, *seed)

    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        module = build(ImportanceSampling, group_size=2, sampling=SamplingConfig(max_new_tokens=2), seed=seed)
        pretend_trainer(module, world_size=2, rank=rank)
        module.loop.replay = Recorded(4, [])
        for iteration in range(2):
            module.loop.iteration = iteration
            module.gather(prompts(1, start=2 * iteration))
    assert len(set(seeds)) == len(seeds) == 6


def test_replay_starts_with_what_was_sampled():
    module = build(ImportanceSampling, group_size=2, sampling=SamplingConfig(max_new_tokens=4))
    experience = module.collect(prompts(3))
    assert sorted(set(experience.group_ids.tolist())) == [0, 1, 2]
    module.training_step(experience)
    assert take_stats(module)["stability/is_ratio_mean"] == pytest.approx(1, abs=1e-5)
    other_weights(module.models.policy, 0.05, seed=4)
    module.loop.iteration = 1
    module.training_step(module.collect(prompts(3, start=3)))
    stats = take_stats(module)
    assert stats["stability/is_ratio_max"] > 1.01
    assert stats["stability/ess"] < 1

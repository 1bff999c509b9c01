"""Rewards normalised by what a run has seen so far, and clipped: the numbers, their memory and what stays raw."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from lit_rlhf import DAPO, GRPO, PPO, REINFORCE, RLOO, DrGRPO, ReMax
from lit_rlhf.algorithms.reward_scaling import RewardScaling
from lit_rlhf.errors import InputError
from lit_rlhf.types import SamplingConfig
from tests.algorithms.ranks import ONE_RANK_EMPTY, UNEVEN, assert_same_run, on_given_rows, run_of_four, start_of
from tests.algorithms.resuming import SaveAt, assert_same, everything, fit_of
from tests.algorithms.settings import take_stats
from tests.algorithms.toys import rollout_of
from tests.helpers import build, prompts

NAN = math.nan


def scaled(scaling, numbers, rewards, lengths=None, **fields):
    return scaling(rollout_of(rewards, lengths or [2] * len(rewards), width=2, **fields), numbers)


def test_the_moments_are_those_of_all_rewards_so_far():
    scaling, numbers, seen = RewardScaling(normalize_rewards=True), {}, []
    for batch in ([1.0, 4.0, 2.5], [-3.0], [100.0, 100.0], [7.0] * 5):
        seen += batch
        found = scaled(scaling, numbers, batch).rewards.tolist()
        mean = statistics.fmean(seen)
        deviation = statistics.stdev(seen)
        assert found == pytest.approx([(r - mean) / deviation for r in batch], abs=1e-12)
    assert numbers["reward_count"] == 11
    assert all(type(value) is float for value in numbers.values()), "checkpoints hold plain numbers"


def test_a_large_constant_costs_no_precision():
    scaling, numbers = RewardScaling(normalize_rewards=True), {}
    for batch in ([1e8 + 1, 1e8 + 2], [1e8 + 3, 1e8 + 4]):
        found = scaled(scaling, numbers, batch).rewards.tolist()
    assert found == pytest.approx([0.5 / 1.2909944487358056, 1.5 / 1.2909944487358056], abs=1e-6)


def test_equal_rewards_are_only_centred():
    scaling, numbers = RewardScaling(normalize_rewards=True), {}
    assert scaled(scaling, numbers, [3.0]).rewards.tolist() == [0.0]
    assert scaled(scaling, numbers, [3.0, 3.0]).rewards.tolist() == [0.0, 0.0]


def test_rows_without_a_reward_or_without_tokens_count_for_nothing():
    scaling, numbers = RewardScaling(normalize_rewards=True), {}
    found = scaled(scaling, numbers, [1.0, NAN, 3.0, 1000.0], [2, 1, 1, 0]).rewards
    assert found[[0, 2]].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    assert found[1].isnan()
    assert numbers["reward_count"] == 2
    scaled(scaling, numbers, [NAN, NAN])
    assert numbers["reward_count"] == 2


def test_the_clip_comes_after():
    clip = RewardScaling(reward_clip=0.5)
    assert scaled(clip, {}, [-7.0, 0.25, 0.75, NAN]).rewards[:3].tolist() == [-0.5, 0.25, 0.5]
    both = RewardScaling(normalize_rewards=True, reward_clip=1.0)
    assert scaled(both, {}, [100.0, 101.0, 102.0, 115.0]).rewards.tolist() == pytest.approx(
        [-4.5 / 7.0475, -3.5 / 7.0475, -2.5 / 7.0475, 1], abs=1e-4
    )


def test_nothing_is_touched_unless_asked():
    rollout, numbers = rollout_of([1.0, NAN], [1, 2]), {}
    assert RewardScaling()(rollout, numbers) is rollout
    assert numbers == {}


def test_what_is_logged_and_filtered_by_stays_raw():
    module = build(
        GRPO, reward_funcs=[lengths], group_size=2, sampling=SamplingConfig(max_new_tokens=6), reward_clip=1.5
    )
    experience = module.collect(prompts(4))
    assert experience.raw_rewards.tolist() == experience.lengths.tolist()
    assert experience.rewards.tolist() == [min(n, 1.5) for n in experience.lengths.tolist()]
    stats = take_stats(module)
    assert stats["reward/reward_mean"] == pytest.approx(float(experience.lengths.double().mean()))
    assert stats["reward/shaped_reward_mean"] == pytest.approx(float(experience.rewards.mean()))


def lengths(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def test_penalties_are_in_units_of_the_scaled_reward():
    module = build(GRPO, normalize_rewards=True, truncation_penalty=0.5)
    rollout = rollout_of([1.0, 3.0], [2, 2], truncated=[True, False], width=2)
    assert module.experience(rollout).rewards.tolist() == pytest.approx([-1 / math.sqrt(2) - 0.5, 1 / math.sqrt(2)])


def test_the_greedy_baseline_is_on_the_same_scale():
    module = build(ReMax, normalize_rewards=True)
    rollout = rollout_of([1.0, 3.0], [1, 1], baseline=torch.tensor([2.0, 2.0], dtype=torch.float64))
    found = module.experience(rollout).advantages[:, 0].tolist()
    assert found == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    clipped = build(ReMax, reward_clip=2.0).experience(replace(rollout, baseline=torch.tensor([9.0, 1.0]).double()))
    assert clipped.advantages[:, 0].tolist() == [-1.0, 1.0]


def test_rewards_per_token_are_refused():
    rollout = replace(rollout_of([1.0], [2]), rewards=torch.ones(1, 2))
    with pytest.raises(InputError, match="scale one reward per completion, and these rewards are"):
        RewardScaling(normalize_rewards=True)(rollout, {})


@pytest.mark.parametrize("clip", [0, -1.0, NAN])
def test_a_clip_without_a_meaning_is_refused(clip):
    with pytest.raises(InputError, match=r"algo\.reward_clip must be"):
        build(GRPO, reward_clip=clip)


# where it changes nothing


@pytest.mark.parametrize(
    ("algorithm", "arguments", "idle"),
    [
        (GRPO, {}, True),
        (GRPO, {"scale_rewards": "batch"}, True),
        (DAPO, {}, False),  # its overlong penalty is added, where it is on
        (GRPO, {"scale_rewards": "none"}, False),
        (DrGRPO, {}, False),
        (GRPO, {"truncation_penalty": 1.0}, False),
        (GRPO, {"reward_clip": 1.0}, False),
        (GRPO, {"kl_coef": 0.1, "kl_in": "reward"}, False),
        (GRPO, {"kl_coef": 0.1, "kl_in": "loss"}, True),
        (RLOO, {}, False),
        (PPO, {}, False),
        (REINFORCE, {}, False),
    ],
)
def test_group_normalisation_makes_it_idle(algorithm, arguments, idle, recwarn):
    build(algorithm, normalize_rewards=True, **arguments)
    sentence = "algo.normalize_rewards has no effect with algo.advantage_estimator=group_normalize; leave it out"
    assert (sentence in [str(warning.message) for warning in recwarn]) == idle
    recwarn.clear()
    build(algorithm, **arguments)
    assert not [warning for warning in recwarn if "normalize_rewards" in str(warning.message)]


# ranks and checkpoints


@pytest.mark.parametrize("lengths", [UNEVEN, ONE_RANK_EMPTY], ids=["uneven", "one rank empty"])
def test_two_ranks_see_all_rewards(lengths, tmp_path):
    scaling = {"normalize_rewards": True, "reward_clip": 1.2}
    make = lambda: on_given_rows(REINFORCE)(tmp_path, lengths=lengths, **scaling)  # noqa: E731
    rows = make().rows
    (expected,) = run_of_four(make, tmp_path, devices=1, epochs=2)
    assert_same_run(run_of_four(make, tmp_path, devices=2, epochs=2), expected, start_of(make()))
    seen = 2 * rows.rewards[rows.response_mask.any(1)].tolist()
    numbers = expected["loop"]["numbers"]
    assert numbers["reward_mean"] == pytest.approx(statistics.fmean(seen))
    assert numbers["reward_square"] / (len(seen) - 1) == pytest.approx(statistics.variance(seen))


@pytest.mark.parametrize("micro_batch", [2, 5])
def test_a_resumed_run_remembers_what_was_seen(micro_batch, tmp_path):
    arguments = {"group_size": 2, "prompts_per_rollout": 8, "minibatches": 2, "update_epochs": 1}
    arguments |= {"sampling": SamplingConfig(max_new_tokens=4), "normalize_rewards": True, "reward_clip": 1.1}
    path = tmp_path / "some.ckpt"
    whole = everything(*fit_of(REINFORCE, arguments, 3, 1, callbacks=[SaveAt(micro_batch, path)]))
    assert whole["loop"]["numbers"]["reward_count"] == 3 * 16
    assert_same(everything(*fit_of(REINFORCE, arguments, 3, 1, seed=1, ckpt_path=path)), whole)

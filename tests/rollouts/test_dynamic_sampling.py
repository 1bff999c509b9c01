"""Refilling a batch until every group teaches something, with scripted rewards and no model."""

import math

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.rollouts import dynamic_sampling
from lit_rlhf.rollouts.dynamic_sampling import informative, refill
from lit_rlhf.rollouts.loader import RolloutLoader
from lit_rlhf.types import SamplingConfig, ScoredRollout, concatenate
from tests.helpers import build, gradients, mask_of, pretend_trainer, prompts, random_experience, tiny_model

NAN = float("nan")


def rollout_of(groups, first_id=0, version=0):
    """One row per reward of every group; a row's response ids say which it is: id * 10 + sample."""
    rewards = torch.tensor([r for group in groups for r in group])
    sizes = [len(group) for group in groups]
    ids = torch.tensor([first_id + i for i, size in enumerate(sizes) for _ in range(size)], dtype=torch.long)
    sample = torch.tensor([g for size in sizes for g in range(size)], dtype=torch.long)
    N, lengths = len(rewards), 1 + ids % 3
    width = int(lengths.max()) if N else 1
    zeros = torch.zeros(N, width)
    return ScoredRollout(
        prompt_ids=ids.unsqueeze(1) + 2,
        prompt_mask=torch.ones(N, 1, dtype=torch.bool),
        response_ids=(ids * 10 + sample).unsqueeze(1).expand(N, width).clone(),
        response_mask=mask_of(lengths, width) if N else torch.zeros(0, 1, dtype=torch.bool),
        behavior_logprobs=zeros,
        truncated=torch.zeros(N, dtype=torch.bool),
        group_ids=ids,
        version=torch.full((N,), version),
        raw_rewards=rewards,
        reward_parts=rewards.unsqueeze(1),
        rewards=rewards,
        old_logprobs=zeros,
    )


class Stream:
    """Further groups, in order; remembers how many were asked for."""

    def __init__(self, groups, first_id):
        self.groups, self.next_id, self.asked = list(groups), first_id, []

    def __call__(self, count):
        self.asked.append(count)
        taken, self.groups = self.groups[:count], self.groups[count:]
        assert len(taken) == count, "the script is too short"
        rollout = rollout_of(taken, self.next_id)
        self.next_id += count
        return rollout


GOOD, GOOD_2, BAD, BAD_2 = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]


def used(rollout):
    """Group ids of the rows that count, in order."""
    return rollout.group_ids[rollout.response_mask.any(1)].tolist()


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (GOOD, True),
        (BAD, False),
        (BAD_2, False),
        ([0.5, 0.5, 0.5], False),
        ([0.5, 0.5, 0.500001], True),
        ([-1.0, 1.0], True),
        ([NAN, NAN], False),
        ([NAN, 1.0], False),
        ([NAN, 1.0, 1.0], False),
        ([NAN, 1.0, 0.0], True),
        ([math.inf, 1.0], True),
    ],
)
def test_a_group_is_informative_when_its_rewards_differ(rewards, expected):
    assert informative(rollout_of([rewards])).tolist() == [expected] * len(rewards)


def test_groups_are_told_apart_by_their_ids_and_not_by_their_place():
    rollout = rollout_of([GOOD, BAD, BAD_2, GOOD_2, [NAN, NAN]])
    order = torch.tensor([3, 8, 0, 7, 5, 1, 9, 2, 6, 4])
    expected = torch.tensor([True, True, False, False, False, False, True, True, False, False])
    assert informative(rollout).tolist() == expected.tolist()
    assert informative(rollout[order]).tolist() == expected[order].tolist()


def test_a_full_batch_of_informative_groups_is_left_alone():
    first, more = rollout_of([GOOD, GOOD_2, GOOD]), Stream([], 3)
    filled = refill(first, None, more, groups=3, group_size=2, max_rounds=4)
    assert (filled.rounds, filled.surplus, more.asked) == (1, None, [])
    assert not filled.filler.any()
    assert (filled.rollout.response_ids == first.response_ids).all()
    assert (filled.rollout.response_mask == first.response_mask).all()


def test_groups_that_teach_nothing_are_replaced():
    first, more = rollout_of([BAD, GOOD, BAD_2]), Stream([GOOD, BAD, GOOD_2, GOOD, GOOD, GOOD], 3)
    filled = refill(first, None, more, groups=3, group_size=2, max_rounds=4)
    # 2 missing at a rate of 1/3: as many as 6, but never more than a batch; 3, 4 (bad) and 5 are sampled
    assert more.asked == [3]
    assert filled.rounds == 2
    assert used(filled.rollout) == [1, 1, 3, 3, 5, 5]
    assert filled.rollout.response_ids[:, 0].tolist() == [10, 11, 30, 31, 50, 51]
    assert filled.surplus is None
    assert not filled.filler.any()


def test_as_many_prompts_are_sampled_as_the_rate_of_informative_groups_calls_for():
    first, more = rollout_of([GOOD] * 6 + [BAD] * 2), Stream([GOOD] * 9, 8)
    filled = refill(first, None, more, groups=8, group_size=2, max_rounds=4)
    assert more.asked == [3]  # 2 missing / (6/8), rounded up
    assert used(filled.rollout) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 8, 8, 9, 9]
    assert used(filled.surplus) == [10, 10]


def test_the_surplus_is_used_first_next_time():
    first, more = rollout_of([BAD, GOOD, BAD]), Stream([GOOD, GOOD, GOOD], 3)
    filled = refill(first, None, more, groups=3, group_size=2, max_rounds=4)
    assert used(filled.rollout) == [1, 1, 3, 3, 4, 4]
    assert used(filled.surplus) == [5, 5]

    second, none = rollout_of([GOOD, BAD, GOOD], first_id=10, version=1), Stream([], 20)
    after = refill(second, filled.surplus, none, groups=3, group_size=2, max_rounds=4)
    assert used(after.rollout) == [5, 5, 10, 10, 12, 12]
    assert after.rollout.version.tolist() == [0, 0, 1, 1, 1, 1]
    assert (after.surplus, after.rounds) == (None, 1)


def test_a_carried_group_can_push_a_fresh_one_to_the_next_batch():
    carried, first = rollout_of([GOOD]), rollout_of([GOOD, GOOD_2], first_id=5, version=1)
    filled = refill(first, carried, Stream([], 9), groups=2, group_size=2, max_rounds=4)
    assert used(filled.rollout) == [0, 0, 5, 5]
    assert used(filled.surplus) == [6, 6]


@pytest.mark.parametrize("max_rounds", [1, 2, 4])
def test_when_the_rounds_run_out_groups_without_weight_complete_the_batch(max_rounds):
    first, more = rollout_of([GOOD, BAD, BAD_2]), Stream([BAD] * 9, 3)
    filled = refill(first, None, more, groups=3, group_size=2, max_rounds=max_rounds)
    assert len(more.asked) == max_rounds - 1
    assert filled.rounds == max_rounds
    assert len(filled.rollout) == 6
    assert filled.filler.tolist() == [False, False, True, True, True, True]
    assert (filled.rollout.response_mask.any(1) == ~filled.filler).all()
    assert used(filled.rollout) == [0, 0]
    assert filled.surplus is None


def test_nothing_informative_at_all_gives_a_batch_without_weight():
    filled = refill(rollout_of([BAD, [NAN, NAN]]), None, Stream([BAD_2, BAD] * 2, 2), 2, 2, max_rounds=3)
    assert filled.filler.all()
    assert len(filled.rollout) == 4
    assert not filled.rollout.response_mask.any()


def test_what_is_carried_is_never_more_than_the_next_batch_can_use(monkeypatch):
    """A rank that is full samples on as long as another is not; rows of two rollouts ago would be too stale."""
    monkeypatch.setattr(dynamic_sampling, "_agree", lambda missing, useful: (2, 0.5))  # the other rank finds nothing
    carried = None
    for version in range(5):
        first = rollout_of([GOOD] * 3, first_id=100 * version, version=version)
        more = lambda count, v=version: rollout_of([GOOD] * count, first_id=100 * v + 50, version=v)  # noqa: E731
        filled = refill(first, carried, more, groups=3, group_size=2, max_rounds=4)
        assert filled.rounds == 4
        assert set((version - filled.rollout.version).tolist()) == {0 if version == 0 else 1}
        carried = filled.surplus
        assert len(carried) == 6
        assert (carried.version == version).all()


def test_rows_without_weight_do_not_change_the_loss():
    module = build(DAPO, kl_coef=0.1, entropy_coef=0.1)
    batch = random_experience(lengths=(3, 7, 1, 5), prompt_lengths=(2, 5, 1, 4), model=module.models.policy)
    filler = random_experience(lengths=(6, 2), prompt_lengths=(5, 3), seed=9)
    filler = type(filler)(**{**vars(filler), "response_mask": torch.zeros_like(filler.response_mask)})
    with_filler = concatenate([batch, filler])

    expected_loss = module.training_step(batch)
    expected = gradients(module, expected_loss)
    loss = module.training_step(with_filler)
    found = gradients(module, loss)

    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=0)


# through DAPO itself


class ByPrompt:
    """Rewards by the prompt's stream position: groups in `good` get different rewards, the others equal ones."""

    def __init__(self, good):
        self.good, self.calls = good, []

    def __call__(self, prompts, completion_ids, **kwargs):
        self.calls.append(len(prompts))
        starts = [int(p.split()[0]) for p in prompts]
        return [float(i % 2) if start in self.good else 1.0 for i, start in enumerate(starts)]


def dapo(good, **arguments):
    defaults = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=3)}
    rewards = ByPrompt(good)
    rewards.__name__ = "by_prompt"
    module = pretend_trainer(build(DAPO, tiny_model(), reward_funcs=[rewards], **{**defaults, **arguments}))
    # the stream must not be shuffled here: prompt 2 + i at stream position i
    module.training_loader(lambda i: [{"prompt": str(2 + i)} for i in range(60)])
    module.prompts._row = lambda position: position
    return module, rewards


def test_dapo_fills_its_batch_and_counts_what_it_took():
    module, rewards = dapo(good={3, 6, 8, 9, 10, 11, 12, 13})
    (experience,) = RolloutLoader(module)
    stats = module.stats.compute()
    assert len(experience) == 8
    assert stats["rollout/dynamic_sampling_rounds"] == len(rewards.calls) == 2
    assert stats["rollout/filler_fraction"] == 0


def test_dapo_counts_its_filler_rows_and_reports_the_rewards_of_all_it_sampled():
    module, rewards = dapo(good={3, 4}, max_rounds=2)
    (experience,) = RolloutLoader(module)
    stats = module.stats.compute()
    assert len(rewards.calls) == 2
    weighs = experience.response_mask.any(1)
    assert experience.group_ids[weighs].unique().tolist() == [1, 2]
    assert weighs.sum() == 4
    assert stats["rollout/filler_fraction"] == 0.5
    # two rounds of 4 groups of 2: the two good groups have rewards 0 and 1, the other six 1 and 1
    assert stats["reward/reward_mean"] == 14 / 16
    assert stats["reward/zero_std_fraction"] == 12 / 16
    assert stats["reward/shaped_reward_mean"] == 0.5  # of what is trained on
    assert stats["rollout/staleness"] == 0
    assert (experience.step_rows, experience.step_tokens) == (4, experience.lengths.sum())


def test_dapo_takes_further_prompts_from_the_stream_and_carries_the_surplus():
    module, rewards = dapo(good={3, 8, 9, 10, 13})
    first = module.collect(module.draw_prompts(4))  # 2 3 4 5: one good; then 6 7 8 9: two; then 10 11: one
    assert first.group_ids.tolist() == [1, 1, 6, 6, 7, 7, 8, 8]
    assert rewards.calls[:2] == [8, 8]
    assert module.loop.prompts_seen == sum(rewards.calls) // 2
    assert (first.advantages[:, 0] != 0).all()
    assert first.response_mask.any(1).all()
    assert len(set(first.raw_rewards.view(-1, 2).sum(1).tolist())) == 1


def test_dapo_without_dynamic_sampling_keeps_every_group():
    module, rewards = dapo(good={3}, dynamic_sampling=False)
    experience = module.collect(module.draw_prompts(4))
    assert experience.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rewards.calls == [8]
    assert experience.response_mask.any(1).all()
    assert (experience.advantages != 0).any(1).tolist() == [False, False, True, True, False, False, False, False]


def test_dapo_collects_without_a_stream_in_one_round():
    module, rewards = dapo(good={3})
    module.prompts = None
    experience = module.collect(prompts(4))  # prompts begin with 2, 3, 4, 5
    assert rewards.calls == [8]
    assert experience.response_mask.any(1).tolist() == [True, True] + [False] * 6
    assert set(experience.group_ids[:2].tolist()) == {1}


def test_the_filter_sees_the_raw_reward_and_not_the_penalty_for_length():
    lengths = []

    def all_right(completion_ids, **kwargs):
        lengths.extend(len(ids) for ids in completion_ids)
        return [1.0] * len(completion_ids)

    arguments = {"overlong_buffer": 5, "sampling": SamplingConfig(max_new_tokens=6), "max_rounds": 1}
    module = build(DAPO, tiny_model(), reward_funcs=[all_right], group_size=4, **arguments)
    module.engine.end_token_ids = list(range(1, 12))
    experience = module.collect(prompts(3))
    assert len(set(lengths)) > 1, "completions must differ in length"
    assert not experience.response_mask.any(), "an all-right group is filler whatever its lengths"

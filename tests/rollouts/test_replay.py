"""The bounded buffer: what it holds, what it draws, and how it comes back from a checkpoint."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lit_rlhf.rollouts.replay import ReplayBuffer
from tests.algorithms.settings import rollout_from
from tests.helpers import random_experience


def rollout(number, groups=3, width=4):
    """Groups of two rows with ids of their own, whose rewards say which rollout they are of."""
    N = 2 * groups
    rows = rollout_from(
        random_experience([1 + i % width for i in range(N)], [1 + i % 3 for i in range(N)], seed=number)
    )
    ids = torch.arange(groups).repeat_interleave(2) + 10 * number
    rewards = number + torch.arange(N) / 100
    return replace(rows, group_ids=ids, version=torch.full((N,), number), rewards=rewards, raw_rewards=rewards)


def filled(capacity, *numbers):
    buffer = ReplayBuffer(capacity, [])
    for number in numbers:
        buffer.add(rollout(number, width=3 + number % 2))
    return buffer


def ids_of(rows):
    return rows.group_ids[::2].tolist()


def test_the_oldest_rollout_leaves_when_one_more_comes():
    buffer = filled(2, 1)
    assert len(buffer) == 6
    buffer.add(rollout(2))
    buffer.add(rollout(3))
    assert len(buffer) == 12
    assert [int(held.version[0]) for held in buffer.rollouts] == [2, 3]
    assert sorted(ids_of(buffer.draw(6, 0, 0))) == [20, 21, 22, 30, 31, 32]


def test_whole_groups_are_drawn_without_repetition():
    buffer = filled(3, 1, 2, 3)
    drawn = buffer.draw(4, 0, 7)
    assert len(drawn) == 8
    assert len(set(ids_of(drawn))) == 4
    assert (drawn.group_ids.view(4, 2)[:, 0] == drawn.group_ids.view(4, 2)[:, 1]).all()
    for held in buffer.rollouts:  # each row is the one that was put in, whatever its width was
        for i, row in enumerate(held.rewards.tolist()):
            for j in (drawn.rewards == row).nonzero().flatten().tolist():
                mask = drawn.response_mask[j]
                assert drawn.response_ids[j][mask].tolist() == held.response_ids[i][held.response_mask[i]].tolist()
                behavior = held.behavior_logprobs[i][held.response_mask[i]]
                assert torch.equal(drawn.behavior_logprobs[j][mask], behavior)
                prompt = held.prompt_ids[i][held.prompt_mask[i]]
                assert drawn.prompt_ids[j][drawn.prompt_mask[j]].tolist() == prompt.tolist()
                assert drawn.version[j] == held.version[i]


def test_the_draw_depends_on_the_seed_alone_and_takes_all_groups_alike():
    buffer = filled(3, 1, 2, 3)
    assert torch.equal(buffer.draw(3, 0, 1, 2).group_ids, filled(3, 0, 1, 2, 3).draw(3, 0, 1, 2).group_ids)
    assert buffer.draw(3, 0, 1, 2).group_ids.tolist() != buffer.draw(3, 0, 2, 1).group_ids.tolist()
    counts = Counter(i for seed in range(300) for i in ids_of(buffer.draw(3, 0, seed)))
    assert len(counts) == 9
    assert all(70 <= count <= 130 for count in counts.values()), counts  # 100 each are expected


def test_a_draw_leaves_the_buffer_as_it_was():
    buffer = filled(2, 1, 2)
    buffer.draw(3, 0, 0).rewards.zero_()
    assert len(buffer) == 12
    assert (buffer.rollouts[0].rewards > 0).all()


@pytest.mark.parametrize(
    ("numbers", "min_age", "versions"),
    [((1, 2, 3), 0, {1, 2, 3}), ((1, 2, 3), 1, {1, 2}), ((1, 2, 3), 2, {1}), ((1,), 2, {1})],
)
def test_only_rollouts_of_some_age_are_drawn_from_unless_there_are_none(numbers, min_age, versions):
    buffer = filled(3, *numbers)
    seen = {int(v) for seed in range(20) for v in buffer.draw(3, min_age, seed).version}
    assert seen == versions


def test_it_comes_back_from_plain_containers(tmp_path):
    buffer = filled(2, 1, 2)
    torch.save(buffer.to_plain(), tmp_path / "buffer.pt")
    found = ReplayBuffer.from_plain(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert found.capacity == 2
    for name, value in vars(buffer.draw(4, 0, 5)).items():
        other = getattr(found.draw(4, 0, 5), name)
        assert (value is other is None) or torch.equal(value, other), name
    found.add(rollout(3))
    assert [int(held.version[0]) for held in found.rollouts] == [2, 3]

"""Rows without a token, which fill up a batch, do not move what the others are compared with."""

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.registry import get_adv_estimator
from tests.algorithms.toys import rollout_of
from tests.helpers import build, mask_of

REWARDS, LENGTHS, GROUPS = [1.0, 0.0, 5.0, 2.0], [2, 3, 1, 3], [0, 0, 1, 1]
FILLERS, EMPTY, OTHERS = [100.0, -7.0], [0, 0], [2, 2]


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (ImportanceSampling, {}),
        (GRPO, {"advantage_estimator": "batch_mean"}),
        (GRPO, {"scale_rewards": "batch"}),
        (GRPO, {"scale_rewards": "std"}),
    ],
)
def test_the_advantages_of_an_algorithm_are_those_without_fillers(algorithm, arguments):
    module = build(algorithm, **arguments)
    expected = module.experience(rollout_of(REWARDS, LENGTHS, GROUPS)).advantages
    padded = rollout_of(REWARDS + FILLERS, LENGTHS + EMPTY, GROUPS + OTHERS)
    found = module.experience(padded).advantages
    torch.testing.assert_close(found[:4], expected, atol=1e-12, rtol=0)
    assert (found[4:] == 0).all()
    assert expected.abs().max() > 0.3


@pytest.mark.parametrize("per_token", [False, True])
def test_the_worked_numbers(per_token):
    mask = mask_of(LENGTHS + EMPTY, 3)
    rewards = torch.tensor(REWARDS + FILLERS, dtype=torch.float64)
    if per_token:
        rewards = rewards.unsqueeze(1).repeat(1, 3) * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    advantages, _ = get_adv_estimator("batch_mean")(rewards, mask)
    assert advantages[:, 0].tolist() == pytest.approx([-1, -2, 3, 0, 0, 0])  # the mean of four is 2
    ids = torch.tensor(GROUPS + OTHERS)
    advantages, _ = get_adv_estimator("group_normalize")(rewards, mask, group_ids=ids, scale_rewards="batch")
    scale = (14 / 3) ** 0.5 + 1e-4
    assert advantages[:, 0].tolist() == pytest.approx([x / scale for x in (0.5, -0.5, 1.5, -1.5, 0, 0)])

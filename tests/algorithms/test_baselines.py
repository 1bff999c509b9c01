"""Baselines: REINFORCE's moving average (C17) and ReMax's greedy completion."""

import pytest
import torch

from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.errors import InputError
from lit_rlhf.types import SamplingConfig
from tests.algorithms.settings import take_stats
from tests.algorithms.toys import rollout_of
from tests.helpers import build, prompts

NAN = float("nan")


def advantages_of(module, rewards, lengths=None, **fields):
    rollout = rollout_of(rewards, lengths or [1] * len(rewards), **fields)
    return module.experience(rollout).advantages[:, 0].tolist()


class TestMovingBaseline:
    """C17."""

    def test_it_is_used_before_it_moves_and_is_bias_corrected(self):
        module = build(REINFORCE)
        assert module.baseline == 0
        assert advantages_of(module, [0.5, 1.5]) == pytest.approx([0.5, 1.5])  # b is 0 at first
        assert module.loop.numbers["baseline_average"] == pytest.approx(0.01, abs=1e-12)
        assert module.baseline == pytest.approx(1.0, abs=1e-12)
        assert advantages_of(module, [2.0, 2.0]) == pytest.approx([1.0, 1.0])
        assert module.loop.numbers["baseline_average"] == pytest.approx(0.0299, abs=1e-12)
        assert module.baseline == pytest.approx(1.5025126, abs=1e-7)
        assert module.loop.numbers["baseline_rollouts"] == 2

    def test_it_averages_completions_and_not_tokens(self):
        module = build(REINFORCE, baseline_decay=0.0)
        advantages_of(module, [1.0, 0.0], [1, 7])
        assert module.baseline == pytest.approx(0.5, abs=1e-12)
        assert advantages_of(module, [1.0, 0.0], [5, 2]) == pytest.approx([0.5, -0.5])

    def test_without_it_the_advantage_is_the_return(self):
        module = build(REINFORCE, baseline_decay=1.0)
        for _ in range(3):
            assert advantages_of(module, [2.0, 4.0]) == pytest.approx([2.0, 4.0])

    def test_it_is_the_mean_of_the_penalised_returns(self):
        module = build(REINFORCE, baseline_decay=0.0, kl_coef=0.1)
        old, ref = torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[-1.5, -1.5]]).double()
        module.experience(rollout_of([2.0], [2], logprobs=old, ref_logprobs=ref))
        assert module.baseline == pytest.approx(2.0 - 0.1 * (0.5 - 0.5), abs=1e-12)

    def test_completions_without_a_reward_neither_count_nor_weigh(self):
        module = build(REINFORCE, baseline_decay=0.0)
        assert advantages_of(module, [1.0, NAN, 3.0]) == pytest.approx([1.0, 0.0, 3.0])
        assert module.baseline == pytest.approx(2.0)
        assert advantages_of(module, [NAN, NAN]) == [0.0, 0.0]
        assert module.baseline == pytest.approx(2.0), "a rollout without a reward moved the baseline"

    def test_returns_are_discounted(self):
        with pytest.warns(UserWarning, match="gamma=0.9"):
            module = build(REINFORCE, gamma=0.9)
        experience = module.experience(rollout_of([1.0], [3]))
        assert experience.advantages[0].tolist() == pytest.approx([0.81, 0.9, 1.0])

    @pytest.mark.parametrize("decay", [-0.1, 1.1])
    def test_a_decay_that_cannot_be_is_refused(self, decay):
        with pytest.raises(InputError, match="baseline_decay must be from 0 to 1"):
            build(REINFORCE, baseline_decay=decay)


class TestGreedyBaseline:
    def test_it_is_the_reward_of_the_greedy_completion_of_the_same_prompt(self):
        sampling = SamplingConfig(max_new_tokens=5)
        module = build(ReMax, group_size=3, sampling=sampling)
        module.engine.end_token_ids = list(range(1, 12))
        experience = module.collect(prompts(4))
        policy = module.models.policy
        for row in range(12):
            ids = experience.prompt_ids[row][experience.prompt_mask[row]]
            greedy = []
            while len(greedy) < 5 and (not greedy or greedy[-1] >= 12):
                greedy.append(int(policy(torch.cat([ids, torch.tensor(greedy).long()])[None]).logits[0, -1].argmax()))
            kept = [i for i in greedy if i not in (0, 1)]
            reward = float(sum(greedy) % 7)
            assert kept, "the greedy completion is empty"
            assert float(experience.baseline[row]) == reward
            A = float(experience.raw_rewards[row]) - reward
            expected = torch.where(experience.response_mask[row], A, 0.0)
            torch.testing.assert_close(experience.advantages[row].double(), expected.double(), atol=1e-6, rtol=0)
        assert take_stats(module)["reward/greedy_reward"] == pytest.approx(float(experience.baseline.mean()))

    def test_a_reward_that_is_missing_on_either_side_gives_no_advantage(self):
        module = build(ReMax)
        baseline = torch.tensor([0.5, NAN, 0.5, 0.5]).double()
        assert advantages_of(module, [1.0, 1.0, NAN, 0.0], baseline=baseline) == pytest.approx([0.5, 0, 0, -0.5])

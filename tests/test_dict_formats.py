"""Plain dictionaries: the formats, what padding and missing keys mean, what is logged, and what is refused."""

import pytest
import torch
from torch.utils.data import DataLoader

from lit_rlhf.algorithms.conservative_ppo import ConservativePPO
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.errors import InputError
from lit_rlhf.types import PreferenceBatch, ScoredRollout, from_dict
from tests.algorithms.settings import ON_POLICY_CLASSES
from tests.helpers import PAD, assert_gradients_equal, build, gradients, pretend_trainer, tiny_model, trainer
from tests.test_dicts import WIDTH, groups, numbers, rows
from tests.test_preference_dicts import GOOD as PAIRS

OFF_POLICY = {"old_log_probs": None, "values": None, "behavior_log_probs": torch.tensor([-20.0, -9.0, -15.0])}


# the layout


def test_rows_become_a_first_token_and_the_rest():
    batch = rows()
    batch |= {"input_ids": torch.tensor([[5, 9, 3, 7, 6, 2], [-1, -1, 8, 3, 1, -1], [0, 0, 4, 0, 5, 6]])}
    batch["attention_mask"] = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1]])
    batch["response_mask"] = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 1], [1] * 6])
    batch |= {key: torch.arange(18.0).view(3, 6) for key in ("old_log_probs", "rewards", "values")}
    found = from_dict(batch, pad_token_id=63)
    assert found.prompt_ids.tolist() == [[5], [8], [4]]
    assert found.prompt_mask.all()
    assert found.response_ids.tolist() == [[9, 3, 7], [3, 1, 63], [5, 6, 63]]
    assert found.response_mask.tolist() == [[False, True, True], [True, False, False], [True, True, False]]
    for value in (found.old_logprobs, found.rewards, found.values):
        assert value.tolist() == [[0, 2, 3], [9, 0, 0], [16, 17, 0]]
    assert found.group_ids.tolist() == [0, 1, 2]
    assert (found.behavior_logprobs, found.old_values, found.advantages, found.step_tokens) == (None,) * 4
    batch |= {"rewards": [1, 2, 3], "advantages": torch.tensor([1.5, 2.5, 3.5])}
    found = from_dict(batch)
    assert found.rewards.tolist() == [1.0, 2.0, 3.0]
    assert found.advantages.tolist() == [[0, 1.5, 1.5], [2.5, 0, 0], [3.5, 3.5, 0]]


def test_numbers_are_floats_without_gradient():
    batch = rows(rewards=torch.tensor([1, 0, 1], dtype=torch.bool), values=numbers(3, 3, WIDTH).half())
    batch["old_log_probs"] = numbers(1, 3, WIDTH).requires_grad_()
    found = from_dict(batch)
    assert (found.rewards.dtype, found.values.dtype) == (torch.float32, torch.float32)
    assert (found.old_logprobs.dtype, found.old_logprobs.requires_grad) == (torch.float64, False)
    assert from_dict(batch | {"rewards": [2, 3, 4]}).rewards.dtype == torch.float32


def test_groups_become_rows_of_repeated_prompts():
    batch = groups(prompt_ids=torch.tensor([[PAD, 6, PAD, 7], [8, PAD, PAD, PAD]]))
    batch["response_ids"][0, 1] = torch.tensor([PAD, PAD, 11, 1])  # padded on the left
    batch["response_masks"][0, 1] = torch.tensor([0, 0, 1, 1])
    found = from_dict(batch, PAD)
    prompts = [ids[mask].tolist() for ids, mask in zip(found.prompt_ids, found.prompt_mask, strict=True)]
    assert prompts == [[6, PAD, 7]] * 2 + [[8]] * 2
    assert found.prompt_mask[:, -1].all()
    assert found.response_ids[1].tolist() == [11, 1, PAD, PAD]
    assert found.old_logprobs[1].tolist() == [*batch["old_log_probs"][0, 1, 2:].tolist(), 0, 0]
    assert found.response_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]]
    assert found.group_ids.tolist() == [0, 0, 1, 1]
    assert found.rewards.tolist() == [1.0, 0.5, 0.0, 2.0]
    batch["prompt_masks"] = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert from_dict(batch, PAD).prompt_ids[0].tolist() == [PAD, 6, PAD, 7]


def moved(batch, left, right):
    """Every row with so many more unattended columns on either side; what stands there does not matter."""
    poison = {"input_ids": -100, "attention_mask": 0, "response_mask": 1}
    pad = torch.nn.functional.pad
    return {k: pad(x, (left, right), value=poison.get(k, float("nan"))) if x.ndim == 2 else x for k, x in batch.items()}


@pytest.mark.parametrize("side", [(3, 0), (0, 2), (1, 4)])
@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [(PPO, {}), (ImportanceSampling, {**OFF_POLICY, "rewards": torch.tensor([1.0, 2.0, 0.0])}), (ConservativePPO, {})],
)
def test_padding_on_either_side_changes_nothing(algorithm, changes, side):
    module = build(algorithm, kl_coef=0.1)
    loss, other = module.training_step(rows(**changes)), None
    metrics = module.pop_metrics()
    other = module.training_step(moved(rows(**changes), *side))
    torch.testing.assert_close(other, loss, atol=1e-12, rtol=1e-10)
    assert module.pop_metrics() == pytest.approx(metrics, abs=1e-9)
    assert_gradients_equal(gradients(module, other), gradients(module, loss))


def test_padding_of_prompts_and_responses_changes_nothing():
    module, batch = build(GRPO, kl_coef=0.1), groups()
    loss = module.training_step(batch)
    expected = gradients(module, loss)
    pad = torch.nn.functional.pad
    for prompt, response in (((2, 0), (0, 3)), ((0, 1), (2, 0)), ((1, 1), (1, 1))):
        wide = {key: pad(batch[key], response, value=PAD) for key in ("response_ids", "response_masks")}
        wide["old_log_probs"] = pad(batch["old_log_probs"], response, value=float("nan"))
        wide["prompt_ids"] = pad(batch["prompt_ids"], prompt, value=PAD)
        other = module.training_step({**batch, **wide})
        torch.testing.assert_close(other, loss, atol=1e-12, rtol=1e-10)
        assert_gradients_equal(gradients(module, other), expected)


# what is not given


def test_groups_without_log_probs_are_on_policy():
    module = build(GRPO, entropy_coef=0.1)
    experience = module.experience_from(groups(old_log_probs=None))
    assert not any(x.requires_grad for x in vars(experience).values() if isinstance(x, torch.Tensor))
    torch.testing.assert_close(experience.old_logprobs, module.score(experience).logprobs.detach())
    assert torch.equal(experience.behavior_logprobs, experience.old_logprobs)
    module.pop_metrics()
    module.training_step(groups(old_log_probs=None)).backward()
    metrics = module.pop_metrics()
    assert (metrics["ratio_min"], metrics["ratio_max"], metrics["approx_kl"]) == (1, 1, 0)


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_values_that_are_missing_are_the_modules_own(value):
    module = build(PPO, value=value)
    with torch.no_grad():
        for weight in module.models.value_head.parameters():
            weight.add_(numbers(1, *weight.shape))
    experience = module.experience_from(rows(values=None))
    own = torch.zeros(3, WIDTH, dtype=torch.float64)
    own[:, 1:] = module.models.score_values(experience).values.detach()
    assert own.abs().max() > 0.1
    torch.testing.assert_close(module.training_step(rows(values=own)), module.training_step(rows(values=None)))


def test_rewards_beside_which_the_algorithm_shapes_may_come_per_token():
    scalar = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    last = torch.zeros(3, WIDTH, dtype=torch.float64)
    last[0, 5], last[1, 2], last[2, 4] = scalar
    advantages = {"advantages": numbers(5, 3)}  # DAPO's own need groups
    for algorithm, extra in ((DAPO, {"overlong_buffer": 4, "sampling": {"max_new_tokens": 5}}), (RLOO, {}), (PPO, {})):
        module = build(algorithm, truncation_penalty=0.5, kl_coef=0.1, kl_in="reward", **extra)
        found = [module.experience_from(rows(rewards=rewards, **advantages)) for rewards in (scalar, last)]
        torch.testing.assert_close(found[0].rewards, found[1].rewards)
    penalty = build(DAPO, **extra, overlong_buffer=4, sampling={"max_new_tokens": 5})
    assert penalty.experience_from(rows(rewards=scalar, **advantages)).rewards.tolist() == [0.5, -0.25, 1.25]


def test_remax_takes_the_greedy_rewards():
    with pytest.raises(InputError, match=r"'greedy_rewards' is missing; ReMax needs .* \[B\]"):
        build(ReMax).training_step(groups())
    found = build(ReMax).experience_from(groups(greedy_rewards=torch.tensor([0.75, 0.5])))
    assert found.advantages[:, 0].tolist() == [0.25, -0.25, -0.5, 1.5]


# training


def split(batch, parts):
    return [
        dict(zip(batch, values, strict=True)) for values in zip(*(x.chunk(parts) for x in batch.values()), strict=True)
    ]


@pytest.mark.parametrize("algorithm", [GRPO, RLOO])
def test_micro_batches_add_up_to_the_batch(algorithm):
    """Of means over rows; dictionaries do not know the tokens of the whole step."""
    module = build(algorithm, kl_coef=0.1)
    whole = gradients(module, module.training_step(groups()))
    pretend_trainer(module, accumulate=2)
    parts = gradients(module, *[module.training_step(part) / 2 for part in split(groups(), 2)])
    assert_gradients_equal(parts, whole)


@pytest.mark.parametrize("settings", [{"value": "shared", "value_clip": None}, {"kl_in": "loss"}])
def test_micro_batches_of_equally_many_tokens_add_up_whatever_the_average(settings):
    module = build(PPO, whiten_advantages=False, **settings)
    batch = rows(**{k: torch.cat([v, v.flip(0)[:1]])[[0, 1, 1, 0]] for k, v in rows().items() if k != "rewards"})
    batch["rewards"] = numbers(8, 4, WIDTH)
    whole = gradients(module, module.training_step(batch))
    pretend_trainer(module, accumulate=2)
    assert_gradients_equal(gradients(module, *[module.training_step(part) / 2 for part in split(batch, 2)]), whole)


PPO_METRICS = """policy_loss value_loss entropy kl_divergence approx_kl clip_fraction advantage_mean advantage_std
    explained_variance value_mean return_mean reward_mean response_length"""


@pytest.mark.parametrize(
    ("algorithm", "changes", "names"),
    [
        (PPO, {}, PPO_METRICS),
        (PPO, {"values": None}, PPO_METRICS),
        (ImportanceSampling, OFF_POLICY, "is_ratio_mean is_ratio_max is_ratio_min clipped_fraction reward_mean"),
        (ConservativePPO, {}, PPO_METRICS + " kl_violation kl_penalty max_kl_threshold"),
    ],
)
def test_every_promised_metric_is_there_after_a_step(algorithm, changes, names):
    module = build(algorithm)
    module.training_step(rows(**changes))
    metrics = module.pop_metrics()
    assert set(names.split()) <= set(metrics)
    expected = float(sum(rows()["rewards"][i][1:][m[1:] > 0].sum() for i, m in enumerate(rows()["response_mask"])))
    assert metrics["reward_mean"] == pytest.approx(expected / 3)


def test_a_trainer_and_an_ordinary_loader_are_enough():
    """No sampler, no reward function, no data module; a step that target_kl forbids does not forbid the next."""
    module = build(PPO, tiny_model().double(), reward_funcs=None, value="shared", lr=1e-3)
    before = [p.detach().clone() for p in module.models.policy.parameters()]
    trainer(epochs=2).fit(module, DataLoader([rows(), rows()], batch_size=None))
    assert any(not torch.equal(p, q) for p, q in zip(module.models.policy.parameters(), before, strict=True))
    stopped = build(PPO, tiny_model().double(), target_kl=1e-9, value="shared", lr=1e-3)
    trainer(epochs=1).fit(stopped, DataLoader([rows(), rows()], batch_size=None))
    assert all(torch.equal(p, q) for p, q in zip(stopped.models.policy.parameters(), before, strict=True))
    stopped.target_kl.target = None
    trainer(epochs=1).fit(stopped, DataLoader([rows()], batch_size=None))
    assert any(not torch.equal(p, q) for p, q in zip(stopped.models.policy.parameters(), before, strict=True))


def test_pairs_are_recognised():
    assert isinstance(from_dict(PAIRS), PreferenceBatch)
    assert build(DPO).training_step(PAIRS).item() == pytest.approx(0.6931472)
    with pytest.raises(InputError, match="GRPO learns from rewards and 'chosen_input_ids' are of pairs"):
        build(GRPO).training_step(PAIRS)
    with pytest.raises(InputError, match="'rejected_attention_mask' is missing"):
        from_dict({key: value for key, value in PAIRS.items() if key != "rejected_attention_mask"})


@pytest.mark.parametrize("algorithm", ON_POLICY_CLASSES)
def test_every_algorithm_learns_from_groups_as_from_its_own_samples(algorithm):
    """What was sampled goes the same way as a dictionary of it."""
    settings = {"value": "shared", "kl_coef": 0.1, "importance_correction": "token", "sampling": {"max_new_tokens": 4}}
    module, again = build(algorithm, **settings), build(algorithm, **settings)
    greedy = torch.tensor([0.25, 0.75])
    batch = groups(greedy_rewards=greedy if algorithm is ReMax else None)
    flat = {name: batch[name].flatten(0, 1) for name in ("response_ids", "old_log_probs", "rewards")}
    mask = batch["response_masks"].flatten(0, 1).bool()
    sampled = ScoredRollout(
        prompt_ids=batch["prompt_ids"].repeat_interleave(2, 0),
        prompt_mask=(batch["prompt_ids"] != PAD).repeat_interleave(2, 0),
        response_ids=flat["response_ids"],
        response_mask=mask,
        behavior_logprobs=flat["old_log_probs"] * mask,
        old_logprobs=flat["old_log_probs"] * mask,
        truncated=torch.zeros(4, dtype=torch.bool),
        group_ids=torch.tensor([0, 0, 1, 1]),
        version=torch.zeros(4, dtype=torch.long),
        raw_rewards=flat["rewards"],
        reward_parts=flat["rewards"].unsqueeze(1),
        rewards=flat["rewards"],
        baseline=greedy.repeat_interleave(2),
    )
    expected = module.training_step(module.experience(module.score_rollout(sampled)))
    torch.testing.assert_close(again.training_step(batch), expected, atol=1e-10, rtol=1e-8)
    assert expected.item() != 0

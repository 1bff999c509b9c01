"""Plain dictionaries of a user's own rollouts train what an experience of the same rows, built by hand, trains."""

import statistics

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.types import CompletionBatch, Experience, pad_left, pad_right
from tests.helpers import (
    PAD,
    assert_gradients_equal,
    build,
    gradients,
    plain_logprobs,
)

F64 = torch.float64
LENGTHS, WIDTH = (6, 3, 5), 6
SAMPLED = ([0, 0, 1, 1, 0, 1], [0, 1, 1], [0, 1, 1, 1, 1])  # the first row has a prompt of two tokens and a hole
SEQUENCES = ([5, 9, 33, 7, 61, 2], [8, 3, 1], [12, 13, 14, 15, 1])


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rows(**changes):
    """Three rows in the format of PPO, right-padded; NaN and impossible ids where nothing is attended to."""
    attended = torch.arange(WIDTH) < torch.tensor(LENGTHS).unsqueeze(1)
    per_token = {
        "old_log_probs": numbers(1, 3, WIDTH) * 0.2 - 3,
        "rewards": numbers(2, 3, WIDTH),
        "values": numbers(3, 3, WIDTH),
    }
    found = {"input_ids": pad_right(SEQUENCES)[0].masked_fill(~attended, -100), "attention_mask": attended.long()}
    found |= {key: value.masked_fill(~attended, float("nan")) for key, value in per_token.items()}
    found["response_mask"] = pad_right(SAMPLED)[0]
    found |= changes
    return {key: value for key, value in found.items() if value is not None}


def groups(**changes):
    """Two prompts of uneven length with two samples each."""
    found = {
        "prompt_ids": pad_left([[5, 6, 7], [8]], PAD)[0],
        "response_ids": torch.tensor([[[9, 10, 1, PAD], [11, 1, PAD, PAD]], [[12, 13, 14, 15], [16, 17, 1, PAD]]]),
        "response_masks": torch.tensor([[[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 1, 1, 1], [1, 0, 1, 0]]]),
        "rewards": torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=F64),
        "old_log_probs": numbers(4, 2, 2, 4) * 0.2 - 4,
    }
    found |= changes
    return {key: value for key, value in found.items() if value is not None}


def by_hand(batch, prompts, responses, masks, advantages, returns=None, **fields):
    """An experience of lists, one per row, padded by hand."""
    width = max(map(len, responses))
    spread = lambda rows: torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=F64)  # noqa: E731
    prompt_ids, prompt_mask = pad_left(prompts)
    count = len(prompts)
    fields = {name: spread(value) if isinstance(value, list) else value for name, value in fields.items()}
    unused = dict.fromkeys(("raw_rewards", "rewards"), torch.zeros(count, dtype=F64))
    plain = {"truncated": torch.zeros(count, dtype=torch.bool), "reward_parts": torch.zeros(count, 1, dtype=F64)}
    plain |= dict.fromkeys(("group_ids", "version", "staleness"), torch.zeros(count, dtype=torch.long))
    rows = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "response_ids": pad_right(responses)[0]}
    rows |= {"response_mask": pad_right(masks)[0].bool(), "advantages": spread(advantages)}
    rows["returns"] = None if returns is None else spread(returns)
    return Experience(**rows, **plain, **unused, **fields)


def picked(batch, key):
    """The entries of each row after its first attended token, as lists."""
    return [x[m > 0][1:].tolist() for x, m in zip(batch[key], batch["attention_mask"], strict=True)]


def plain_gae(rewards, values, mask, gamma, lam):
    """From the sums: A_t = sum_l (gamma lambda)^l delta_(t+l) over the sampled tokens alone."""
    kept = [t for t, m in enumerate(mask) if m]
    r, v = [rewards[t] for t in kept], [values[t] for t in kept] + [0.0]
    deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(kept))]
    found = [0.0] * len(mask)
    for i, t in enumerate(kept):
        found[t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(kept)))
    return found


# what is trained on


@pytest.mark.parametrize("whiten", [True, False])
def test_ppo_on_a_dictionary_is_ppo_on_the_experience_built_by_hand(whiten):
    batch = rows(old_values=numbers(6, 3, WIDTH))
    settings = {"gamma": 0.9, "gae_lambda": 0.8, "kl_coef": 0.1, "value": "shared", "entropy_coef": 0.01}
    module = build(PPO, **settings, whiten_advantages=whiten)
    masks = [row[1:] for row in SAMPLED]
    with torch.no_grad():  # the reference is another model than the policy, the values are not 0
        for weight in [*module.models.policy.parameters(), *module.models.value_head.parameters()]:
            weight.add_(0.02 * numbers(weight.numel(), *weight.shape))
    prompts, responses = [row[:1] for row in SEQUENCES], [row[1:] for row in SEQUENCES]
    old, reward, values, centre = (picked(batch, k) for k in ("old_log_probs", "rewards", "values", "old_values"))
    ref = []
    for prompt, response, mask in zip(prompts, responses, masks, strict=True):
        whole = {"prompt_ids": torch.tensor([prompt]), "prompt_mask": torch.ones(1, 1, dtype=torch.bool)}
        whole |= {"response_ids": torch.tensor([response]), "response_mask": torch.ones(1, len(response)).bool()}
        ref.append((plain_logprobs(module.models.reference, whole)[0] * torch.tensor(mask)).tolist())
    zipped = list(zip(reward, old, ref, values, masks, strict=True))
    shaped = [[r - 0.1 * (o - f) for r, o, f in zip(rr, oo, ff, strict=True)] for rr, oo, ff, _, _ in zipped]
    advantages = [plain_gae(s, v, m, 0.9, 0.8) for s, v, m in zip(shaped, values, masks, strict=True)]
    returns = [[a + v for a, v in zip(aa, vv, strict=True)] for aa, vv in zip(advantages, values, strict=True)]
    if whiten:
        counted = [a for aa, mm in zip(advantages, masks, strict=True) for a, m in zip(aa, mm, strict=True) if m]
        mean, var = statistics.fmean(counted), statistics.variance(counted)
        advantages = [[(a - mean) / (var + 1e-8) ** 0.5 for a in row] for row in advantages]
    fields = {"old_logprobs": old, "behavior_logprobs": old, "values": centre}
    experience = by_hand(batch, prompts, responses, masks, advantages, returns, **fields)
    loss, expected = module.training_step(batch), module.training_step(experience)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-10)
    assert_gradients_equal(gradients(module, loss), gradients(module, expected))


def test_grpo_on_a_dictionary_is_grpo_on_the_experience_built_by_hand():
    batch = groups()
    module = build(GRPO)
    advantages = []
    for scores in batch["rewards"].tolist():
        mean, std = statistics.fmean(scores), statistics.stdev(scores)
        advantages += [(score - mean) / (std + 1e-4) for score in scores]
    masks = [row.tolist() for row in batch["response_masks"].flatten(0, 1)]
    spread = [[a * m for m in mask] for a, mask in zip(advantages, masks, strict=True)]
    old = [row.tolist() for row in batch["old_log_probs"].flatten(0, 1)]
    prompts, responses = [[5, 6, 7], [5, 6, 7], [8], [8]], [r.tolist() for r in batch["response_ids"].flatten(0, 1)]
    experience = by_hand(batch, prompts, responses, masks, spread, old_logprobs=old, behavior_logprobs=old)
    loss, expected = module.training_step(batch), module.training_step(experience)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-10)
    assert_gradients_equal(gradients(module, loss), gradients(module, expected))


def whole(sequences=SEQUENCES):
    """The sequences after their first token, by hand."""
    ids, mask = pad_right([row[1:] for row in sequences])
    first = torch.tensor([row[:1] for row in sequences])
    return CompletionBatch(first, torch.ones_like(first, dtype=torch.bool), ids, mask)


def test_importance_sampling_by_sequence_from_the_sums():
    batch = rows(old_log_probs=None, values=None, response_mask=None, rewards=torch.tensor([1.0, -2.0, 4.0]))
    module = build(ImportanceSampling, clip_ratio=2.0)
    lp = plain_logprobs(module.models.policy, whole())
    raw = torch.tensor([1.5, 0.1, 3.0], dtype=F64)
    batch["behavior_log_probs"] = lp.sum(1) - raw.log()
    scores = module.models.score(whole()).logprobs
    expected = (
        -sum(w * (r - 1) * scores[i].sum() for i, (w, r) in enumerate(((1.5, 1.0), (0.5, -2.0), (2.0, 4.0)))) / 11
    )
    loss = module.training_step(batch)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    assert_gradients_equal(gradients(module, loss), gradients(module, expected))
    metrics = module.pop_metrics()
    found = [metrics[name] for name in ("is_ratio_mean", "is_ratio_max", "is_ratio_min", "clipped_fraction")]
    assert found == pytest.approx([4.6 / 3, 3.0, 0.1, 2 / 3])
    own = {"advantages": torch.tensor([3.0, 0.0, -1.0])}  # then used as given, per row or per token
    expected = -(1.5 * 3 * scores[0].sum() - 2 * scores[2].sum()) / 11
    torch.testing.assert_close(module.training_step({**batch, **own}), expected, atol=1e-9, rtol=1e-9)
    own = {"advantages": own["advantages"].unsqueeze(1).expand(3, WIDTH)}
    torch.testing.assert_close(module.training_step({**batch, **own}), expected, atol=1e-9, rtol=1e-9)


def test_importance_sampling_by_token():
    batch = rows(old_log_probs=None, values=None, advantages=torch.ones(3))
    module = build(ImportanceSampling, clip_ratio=2.0)
    sampled = pad_right([row[1:] for row in SAMPLED])[0].bool()
    lp = plain_logprobs(module.models.policy, whole())
    raw = torch.tensor([[0.2, 1.0, 1.0, 1.0, 5.0], [1.0, 1.5, 1.0, 1.0, 1.0], [1.0, 4.0, 0.6, 1.0, 1.0]], dtype=F64)
    behavior = torch.zeros(3, WIDTH, dtype=F64)
    behavior[:, 1:] = lp - raw.log()
    weights = raw.clamp(0.5, 2.0)
    loss = module.training_step({**batch, "behavior_log_probs": behavior})
    expected = -(weights * lp)[sampled].sum() / sampled.sum()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-9, rtol=1e-9)
    assert module.pop_metrics()["clipped_fraction"] == pytest.approx(2 / 9)  # 0.2 is not sampled


# worked numbers


def experience_of(algorithm, batch, **settings):
    return build(algorithm, **settings).experience_from(batch)


@pytest.mark.parametrize(
    ("rewards", "sampled", "advantages", "returns"),
    [
        ([9.0, 0.0, 0.0, 1.0], [1, 1, 1, 1], [0.21712, 0.246, 0.3], [0.71712, 0.846, 1.0]),
        (1.0, [0, 1, 1, 1], [0.21712, 0.246, 0.3], [0.71712, 0.846, 1.0]),
        ([0.0, 0.0, 7.0, 1.0], [1, 1, 0, 1], [0.346, 0.0, 0.3], [0.846, 0.0, 1.0]),
    ],
)
def test_gae_of_a_worked_example(rewards, sampled, advantages, returns):
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8]]),
        "attention_mask": torch.ones(1, 4),
        "response_mask": torch.tensor([sampled]),
        "old_log_probs": torch.full((1, 4), -2.0),
        "rewards": torch.tensor([rewards]),
        "values": torch.tensor([[9.0, 0.5, 0.6 if sampled[2] else 9.0, 0.7]]),
    }
    plain = {"gamma": 0.9, "gae_lambda": 0.8, "kl_coef": 0.0, "whiten_advantages": False}
    found = experience_of(PPO, batch, **plain)
    assert found.advantages[0].tolist() == pytest.approx(advantages, abs=1e-6)
    assert found.returns[0].tolist() == pytest.approx(returns, abs=1e-6)


def test_group_advantages_of_a_worked_example():
    batch = {
        "prompt_ids": torch.tensor([[5], [6]]),
        "response_ids": torch.tensor([[[7, 1]] * 4, [[8, 1]] * 4]),
        "response_masks": torch.ones(2, 4, 2),
        "rewards": torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5] * 4]),
    }
    std, loo = (experience_of(algorithm, batch).advantages[:, 1].tolist() for algorithm in (GRPO, RLOO))
    assert std == pytest.approx([0.8658754, -0.8658754, -0.8658754, 0.8658754, 0, 0, 0, 0], abs=1e-6)
    assert loo == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, 0, 0], abs=1e-6)


def test_a_score_per_row_lands_on_the_last_sampled_token():
    """C2: r = [-.05, 2.05] of the score 2 and the KL of the two tokens, and with rewards to go [2, 2.05]."""
    module = build(REINFORCE, kl_coef=0.1)
    batch = {"input_ids": torch.tensor([[5, 6, 7, PAD]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    lp = plain_logprobs(module.models.reference, whole([[5, 6, 7]]))
    old = torch.tensor([[0.0, 0.5, -0.5, 0.0]]) + torch.nn.functional.pad(lp, (1, 1))
    for rewards in (torch.tensor([2.0]), torch.tensor([[9.0, 0.0, 2.0, 9.0]])):
        found = module.experience_from({**batch, "old_log_probs": old, "rewards": rewards})
        assert found.rewards[0].tolist() == pytest.approx([-0.05, 2.05], abs=1e-6)
        assert found.returns[0].tolist() == pytest.approx([2.0, 2.05], abs=1e-6)

"""What must hold for the algorithms whatever the model: padding, splits, limits, and exhaustive enumeration."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import Experience, SamplingConfig, ScoredRollout
from tests.helpers import (
    VOCABULARY,
    as_completions,
    assert_gradients_equal,
    build,
    gradients,
    mask_of,
    plain_logprobs,
    pretend_trainer,
    random_experience,
    tiny_model,
    with_columns,
)

ON_POLICY = [GRPO, DAPO]
AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
EVERY_TERM = {"kl_coef": 0.3, "entropy_coef": 0.1}


def setting(algorithm, **arguments):
    """A module in float64 and six uneven rows for it, old and reference policies near its own."""
    module = build(algorithm, **(arguments if algorithm is SFT else {**EVERY_TERM, **arguments}))
    rows = random_experience(model=module.models.policy)
    return module, as_completions(rows) if algorithm is SFT else rows


def take_stats(module):
    values = {name: float(value) for name, value in module.stats.compute().items()}
    module.stats.reset()
    return values


def loss_gradients_stats(module, *batches):
    losses = [module.training_step(batch) for batch in batches]
    return sum(losses).item(), gradients(module, *losses), take_stats(module)


def assert_stats_equal(found, expected, without=()):
    assert found.keys() == expected.keys()
    assert any(value != 0 for value in expected.values())
    for name in expected.keys() - set(without):
        assert found[name] == pytest.approx(expected[name], abs=1e-9), name


# C26, C27: what is not a token and where a row stands does not matter


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (GRPO, {}),
        (GRPO, {"loss_agg": "seq-mean-token-sum-norm", "kl_estimator": "k2"}),
        (DAPO, {}),
        (DAPO, {"loss_agg": "seq-mean-token-sum", "kl_estimator": "k1"}),
        (SFT, {}),
    ],
)
def test_padding_columns_of_nan_change_nothing(algorithm, arguments, left, right):
    module, batch = setting(algorithm, **arguments)
    loss, expected, stats = loss_gradients_stats(module, batch)

    padded = with_columns(batch, left, right)
    if algorithm is not SFT:
        assert padded.advantages.isnan().any() == (right > 0)
    found_loss, found, found_stats = loss_gradients_stats(module, padded)

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)
    assert_stats_equal(found_stats, stats)


@pytest.mark.parametrize("estimator", ["group_normalize", "rloo", "rewards_to_go"])
def test_padding_columns_change_no_advantage(estimator):
    module, batch = setting(GRPO, advantage_estimator=estimator)
    T = batch.response_mask.shape[1]
    expected, found = module.compute_advantages(batch)[0], module.compute_advantages(with_columns(batch, 2, 3))[0]
    assert (found[:, :T] == expected).all()
    assert (found[:, T:] == 0).all()


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_gradients_of_masked_cells_are_zero_even_where_everything_is_nan(algorithm, loss_agg):
    module, batch = setting(algorithm, loss_agg=loss_agg)
    batch = with_columns(batch, right=2)
    logprobs = batch.old_logprobs.nan_to_num().add(0.1).requires_grad_()
    entropy = torch.rand_like(logprobs).requires_grad_()

    sum(module.compute_loss(Scores(logprobs, entropy), batch).values()).backward()

    for gradient in (logprobs.grad, entropy.grad):
        assert (gradient[~batch.response_mask] == 0).all()
        assert (gradient[batch.response_mask] != 0).any()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("algorithm", [*ON_POLICY, SFT])
def test_the_order_of_the_rows_does_not_matter(algorithm):
    module, batch = setting(algorithm)
    loss, expected, stats = loss_gradients_stats(module, batch)

    found_loss, found, found_stats = loss_gradients_stats(module, batch[torch.tensor([4, 1, 5, 0, 3, 2])])

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)
    assert_stats_equal(found_stats, stats)


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_advantages_follow_their_rows_however_groups_are_numbered(algorithm):
    module, batch = setting(algorithm)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    shuffled = batch[order]
    renamed = type(shuffled)(**{**vars(shuffled), "group_ids": torch.tensor([900, -3, 40])[shuffled.group_ids]})

    expected, found = module.compute_advantages(batch)[0], module.compute_advantages(renamed)[0]

    assert (expected != 0).any()
    torch.testing.assert_close(found, expected[order], atol=1e-12, rtol=0)


# C28: one batch, any split


def split(batch, parts):
    """Micro-batches of one step, each with the counts of the whole."""
    counts = {"step_tokens": batch.response_mask.sum(), "step_rows": batch.response_mask.any(1).sum()}
    return [type(batch)(**{**vars(batch[torch.tensor(rows)]), **counts}) for rows in parts]


SPLITS = {
    "even": [[0, 1, 2], [3, 4, 5]],
    "uneven": [[5, 0], [2], [1, 3, 4]],
    "one by one": [[0], [1], [2], [3], [4], [5]],
}


@pytest.mark.parametrize("parts", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_any_split_into_micro_batches_gives_the_same_gradient(algorithm, loss_agg, parts):
    module = build(algorithm, loss_agg=loss_agg, **EVERY_TERM)
    batch = random_experience(lengths=(3, 7, 0, 5, 2, 6), model=module.models.policy)  # "one by one": one is empty
    loss, expected, stats = loss_gradients_stats(module, batch)

    found_loss, found, found_stats = loss_gradients_stats(module, *split(batch, parts))

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)
    per_part = [name for name in stats if name.startswith("loss/")]  # a mean over the micro-batches of their shares
    assert_stats_equal(found_stats, stats, without=per_part)
    for name in per_part:
        assert found_stats[name] * len(parts) == pytest.approx(stats[name], abs=1e-12)


@pytest.mark.parametrize("parts", SPLITS.values(), ids=SPLITS)
def test_any_split_of_demonstrations_gives_the_same_gradient(parts):
    module = build(SFT)
    batch = as_completions(random_experience(lengths=(3, 7, 0, 5, 2, 6)))
    loss, expected, _ = loss_gradients_stats(module, batch)

    found_loss, found, _ = loss_gradients_stats(module, *split(batch, parts))

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("policy_loss", ["clip", "gspo", "cispo"])
def test_rows_without_an_advantage_can_be_left_out_of_the_update(policy_loss, loss_agg):
    module, batch = setting(GRPO, kl_coef=0, entropy_coef=0, policy_loss=policy_loss, loss_agg=loss_agg)
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
    module, batch = setting(GRPO, kl_coef=0, entropy_coef=0)
    short = replace(batch, advantages=batch.advantages.new_zeros(batch.advantages.shape)).with_signal()
    assert len(short) == 1
    assert all((g == 0).all() for g in gradients(module, module.training_step(short)).values())


@pytest.mark.parametrize(
    ("arguments", "skips"),
    [
        ({}, True),
        ({"policy_loss": "gspo"}, True),
        ({"kl_coef": 0.1}, False),
        ({"entropy_coef": 0.1}, False),
        ({"policy_loss": lambda old_logp, logp, advantages, mask: (logp, {})}, False),
    ],
)
def test_no_row_is_left_out_of_a_term_that_acts_on_all(arguments, skips):
    assert build(GRPO, skip_zero_advantage=True, **arguments).skip_zero_advantage == skips
    assert not build(GRPO, **arguments).skip_zero_advantage


def test_no_row_is_left_out_of_a_loss_that_a_subclass_adds_to():
    class WithATermOfItsOwn(GRPO):
        def compute_loss(self, scores, batch):
            return {**super().compute_loss(scores, batch), "length_loss": scores.logprobs.mean()}

    assert not build(WithATermOfItsOwn, skip_zero_advantage=True).skip_zero_advantage


@pytest.mark.parametrize("algorithm", [*ON_POLICY, SFT])
def test_the_loss_undoes_what_lightning_and_ddp_divide_by(algorithm):
    module, batch = setting(algorithm)
    whole, _, stats = loss_gradients_stats(module, batch)
    parts = split(batch, SPLITS["uneven"])

    pretend_trainer(module, accumulate=3, world_size=2)
    losses = [module.training_step(part).item() for part in parts]

    assert sum(losses) / 3 / 2 == pytest.approx(whole, abs=1e-12)
    # three micro-batches of one of two ranks: the mean of what was recorded, halved, is the step's loss
    assert take_stats(module)["loss/loss"] / 2 == pytest.approx(stats["loss/loss"], abs=1e-12)


@pytest.mark.parametrize("algorithm", [*ON_POLICY, SFT])
def test_without_counts_a_batch_is_one_of_the_steps_micro_batches(algorithm):
    module, batch = setting(algorithm)
    whole = module.training_step(batch).item()
    pretend_trainer(module, accumulate=4)
    assert module.training_step(batch).item() / 4 == pytest.approx(whole / 4, abs=1e-12)


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_a_step_without_any_valid_token_has_a_loss_and_gradients_of_zero(algorithm, counted, loss_agg):
    module = build(algorithm, loss_agg=loss_agg, **EVERY_TERM)
    batch = random_experience(lengths=(0, 0, 0, 0), prompt_lengths=(1, 3, 2, 2))
    batches = split(batch, [[0, 1], [2, 3]]) if counted else [batch]

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


# The value of the loss, against the papers' sums written as loops


def paper_loss(batch, logprobs, entropy, agg, low, high, kl_coef, entropy_coef, max_length):
    """J's negative with loops over rows and tokens: clipped objective, k3 to the reference, entropy bonus."""
    rows, tokens = 0, 0
    policy, kl, bonus = [], [], []
    for i in range(len(batch)):
        cells = [t for t in range(batch.response_mask.shape[1]) if batch.response_mask[i, t]]
        rows, tokens = rows + bool(cells), tokens + len(cells)
        row_policy = row_kl = 0.0
        for t in cells:
            ratio = math.exp(float(logprobs[i, t]) - float(batch.old_logprobs[i, t]))
            A = float(batch.advantages[i, t])
            row_policy -= min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)
            other = math.exp(float(batch.ref_logprobs[i, t]) - float(logprobs[i, t]))
            row_kl += other - math.log(other) - 1
            bonus.append(float(entropy[i, t]))
        share = 1 / max(len(cells), 1) if agg == "seq-mean-token-mean" else 1
        share = 1 / max_length if agg == "seq-mean-token-sum-norm" else share
        policy.append(row_policy * share)
        kl.append(row_kl * share)
    count = tokens if agg == "token-mean" else rows
    return sum(policy) / count + kl_coef * sum(kl) / count - entropy_coef * sum(bonus) / tokens


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_the_loss_is_the_papers_sum(algorithm, loss_agg):
    module = build(algorithm, loss_agg=loss_agg, **EVERY_TERM, sampling=SamplingConfig(max_new_tokens=9))
    batch = random_experience(lengths=(3, 7, 0, 5, 2, 6), model=module.models.policy)
    logprobs = plain_logprobs(module.models.policy, batch)
    entropy = module.models.score(batch, entropy=True).entropy.detach()
    high = {GRPO: 0.2, DAPO: 0.28}[algorithm]

    found = module.training_step(batch).item()

    assert found == pytest.approx(paper_loss(batch, logprobs, entropy, loss_agg, 0.2, high, 0.3, 0.1, 9), abs=1e-9)
    stats, ratio = take_stats(module), (logprobs - batch.old_logprobs)[batch.response_mask].exp()
    A = batch.advantages[batch.response_mask]
    clipped = [(r < 0.8 and a < 0) or (r > 1 + high and a > 0) for r, a in zip(ratio.tolist(), A.tolist(), strict=True)]
    assert 0 < sum(clipped) < len(clipped)
    assert stats["stability/clip_fraction"] == pytest.approx(sum(clipped) / len(clipped), abs=1e-12)
    assert stats["stability/ratio_max"] == pytest.approx(float(ratio.max()), abs=1e-9)
    assert stats["stability/ratio_min"] == pytest.approx(float(ratio.min()), abs=1e-9)
    assert stats["stability/approx_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), abs=1e-9)
    assert stats["stability/approx_kl_k1"] == pytest.approx(float(-ratio.log().mean()), abs=1e-9)
    assert stats["stability/entropy"] == pytest.approx(float(entropy[batch.response_mask].mean()), abs=1e-9)
    log_ref = (batch.ref_logprobs - logprobs)[batch.response_mask]
    assert stats["stability/kl_divergence"] == pytest.approx(float((log_ref.exp() - log_ref - 1).mean()), abs=1e-9)
    assert stats["stability/advantage_mean"] == pytest.approx(float(A.mean()), abs=1e-9)
    assert stats["stability/advantage_std"] == pytest.approx(float(A.std()), abs=1e-9)
    assert stats["loss/loss"] == pytest.approx(found, abs=1e-12)
    terms = sum(stats[f"loss/{name}"] for name in ("policy_loss", "kl_loss", "entropy_loss"))
    assert terms == pytest.approx(found, abs=1e-12)


def test_the_sft_loss_is_the_mean_negative_log_likelihood_of_the_completions():
    module, batch = build(SFT), as_completions(random_experience(lengths=(3, 7, 0, 5, 2, 6)))
    logprobs = plain_logprobs(module.models.policy, batch)
    expected = -float(logprobs.sum()) / 23
    assert module.training_step(batch).item() == pytest.approx(expected, abs=1e-9)
    assert take_stats(module)["rollout/response_length_max"] == 7


def test_the_sft_loss_of_a_flat_model_is_log_v():
    module, batch = build(SFT), as_completions(random_experience())
    with torch.no_grad():
        module.models.policy.lm_head.weight.zero_()
    assert module.training_step(batch).item() == pytest.approx(math.log(VOCABULARY), abs=1e-12)


# C29 to C33


def on_policy_rows(module):
    batch = random_experience(model=module.models.policy)
    logprobs = plain_logprobs(module.models.policy, batch)
    return type(batch)(**{**vars(batch), "old_logprobs": logprobs, "ref_logprobs": logprobs})


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
def test_on_policy_the_algorithms_agree_and_follow_reinforce(loss_agg):
    found = {}
    for algorithm in ON_POLICY:
        module = build(algorithm, loss_agg=loss_agg)
        batch = on_policy_rows(module)
        _, found[algorithm], stats = loss_gradients_stats(module, batch)
        for name in ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "approx_kl", "approx_kl_k1"):
            assert stats[f"stability/{name}"] == pytest.approx(0, abs=1e-12)
        assert stats["stability/ratio_mean"] == pytest.approx(1, abs=1e-9)
    assert_gradients_equal(found[DAPO], found[GRPO], atol=1e-12)

    logprobs = module.models.score(batch).logprobs  # REINFORCE: -agg(A lp), with no ratio
    per_token = -batch.advantages * logprobs
    lengths = batch.response_mask.sum(1)
    rows = torch.stack([row[: int(n)].sum() for row, n in zip(per_token, lengths, strict=True)])
    reinforce = {
        "token-mean": rows.sum() / lengths.sum(),
        "seq-mean-token-mean": (rows / lengths).mean(),
        "seq-mean-token-sum": rows.mean(),
        "seq-mean-token-sum-norm": rows.mean() / 64,
    }[loss_agg]
    assert_gradients_equal(found[GRPO], gradients(module, reinforce), atol=1e-9)


def test_with_equal_clip_ratios_and_aggregation_dapo_is_grpo():
    shared = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "loss_agg": "token-mean"}
    found = [loss_gradients_stats(module, batch) for module, batch in (setting(a, **shared) for a in ON_POLICY)]
    assert found[0][0] == found[1][0]
    assert_gradients_equal(found[0][1], found[1][1], atol=1e-12)


def test_the_high_clip_ratio_is_dapos():
    module, batch = setting(DAPO)
    loss, _, _ = loss_gradients_stats(module, batch)
    other, _, _ = loss_gradients_stats(*setting(DAPO, clip_ratio_high=0.2))
    assert abs(loss - other) > 1e-4


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_without_a_clip_the_loss_is_minus_ratio_times_advantage(algorithm):
    module = build(algorithm, clip_ratio_low=1e9, clip_ratio_high=1e9, loss_agg="token-mean")
    batch = random_experience(model=module.models.policy)
    ratio = (plain_logprobs(module.models.policy, batch) - batch.old_logprobs).exp()
    expected = -(ratio * batch.advantages)[batch.response_mask].mean()
    assert module.training_step(batch).item() == pytest.approx(float(expected), abs=1e-9)


def test_grpo_without_a_scale_and_with_a_constant_length_is_dr_grpo():
    sampling = SamplingConfig(max_new_tokens=10)
    module = build(GRPO, scale_rewards="none", loss_agg="seq-mean-token-sum-norm", sampling=sampling)
    batch = on_policy_rows(module)
    batch = type(batch)(**{**vars(batch), "advantages": module.compute_advantages(batch)[0]})
    R, lengths = batch.rewards.view(3, 2), batch.lengths.view(3, 2)
    expected = -float(((R - R.mean(1, keepdim=True)) * lengths).sum()) / 10 / 6
    assert abs(expected) > 1e-3
    assert module.training_step(batch).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_rewards_may_be_shifted_and_scaled(algorithm):
    module, batch = setting(algorithm)

    def advantages(rewards):
        return module.compute_advantages(type(batch)(**{**vars(batch), "rewards": rewards}))[0]

    expected = advantages(batch.rewards)
    torch.testing.assert_close(advantages(batch.rewards + 5), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(advantages(batch.rewards * 3), expected, atol=1e-2, rtol=1e-3)  # up to eps = 1e-4
    assert (advantages(-batch.rewards) == -expected).all()


def test_with_advantages_of_rloo_the_scale_of_the_rewards_stays():
    module, batch = setting(GRPO, advantage_estimator="rloo")
    tripled = type(batch)(**{**vars(batch), "rewards": 3 * batch.rewards})
    expected = 3 * module.compute_advantages(batch)[0]
    torch.testing.assert_close(module.compute_advantages(tripled)[0], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_at_the_reference_the_kl_is_zero_and_does_not_push(estimator):
    module = build(GRPO, kl_coef=1.0, kl_estimator=estimator)
    batch = on_policy_rows(module)
    batch = type(batch)(**{**vars(batch), "advantages": torch.zeros_like(batch.advantages)})
    loss, found, stats = loss_gradients_stats(module, batch)
    assert loss == pytest.approx(0, abs=1e-12)
    assert stats["stability/kl_divergence"] == pytest.approx(0, abs=1e-12)
    assert max(float(gradient.abs().max()) for gradient in found.values()) < 1e-9


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_minimising_the_kl_alone_brings_the_policy_back(estimator):
    module = build(GRPO, kl_coef=1.0, kl_estimator=estimator)
    batch = random_experience(model=module.models.policy)
    batch = type(batch)(**{**vars(batch), "advantages": torch.zeros_like(batch.advantages)})
    divergence = []
    optimizer = torch.optim.SGD(module.models.policy.parameters(), lr=0.01)
    for _ in range(5):
        loss, _, stats = loss_gradients_stats(module, batch)
        divergence.append(stats["stability/kl_divergence"])
        assert loss > 0
        optimizer.step()
    assert divergence[-1] < 0.9 * divergence[0]


def test_the_entropy_bonus_raises_the_entropy():
    module, entropies = build(GRPO, entropy_coef=1.0), []
    batch = on_policy_rows(module)
    batch = type(batch)(**{**vars(batch), "advantages": torch.zeros_like(batch.advantages)})
    optimizer = torch.optim.SGD(module.models.policy.parameters(), lr=0.1)
    for _ in range(3):
        _, _, stats = loss_gradients_stats(module, batch)
        entropies.append(stats["stability/entropy"])
        optimizer.step()
    assert 0 <= entropies[0] < entropies[1] < entropies[2] <= math.log(VOCABULARY)


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_gradients_reach_the_policy_alone(algorithm):
    module, batch = setting(algorithm)
    frozen = {n: getattr(batch, n).clone().requires_grad_() for n in ("old_logprobs", "ref_logprobs", "advantages")}
    module.training_step(type(batch)(**{**vars(batch), **frozen})).backward()
    assert all(x.grad is None or (x.grad == 0).all() for x in frozen.values())
    assert all(p.grad is None for p in module.models.reference.parameters())
    assert any((p.grad != 0).any() for p in module.models.policy.parameters())


@pytest.mark.parametrize("loss_agg", AGGREGATIONS[:2])
@pytest.mark.parametrize("algorithm", [*ON_POLICY, SFT])
def test_the_gradient_is_that_of_finite_differences(algorithm, loss_agg):
    arguments = {} if algorithm is SFT else {"loss_agg": loss_agg}
    module, batch = setting(algorithm, model=tiny_model("gpt2").double(), **arguments)  # Llama's norm is in float32
    found = gradients(module, module.training_step(batch))
    parameters = dict(module.models.named_parameters())
    for name in ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.ln_f.weight"):
        name = f"policy.{name}"
        parameter, index, step = parameters[name], int(found[name].abs().argmax()), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[index] += sign * step
                values.append(module.training_step(batch).item())
                parameter.view(-1)[index] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert float(found[name].view(-1)[index]) == pytest.approx(expected, rel=1e-5, abs=1e-8), name


# C20 to C23: worked numbers and exhaustive enumeration, through compute_advantages and compute_loss


def rollout_of(rewards, lengths, group_ids=None, logprobs=None, width=None):
    """A scored rollout of which only rewards, lengths and old log-probs matter."""
    N, width = len(rewards), width or max(lengths)
    zeros, rewards = torch.zeros(N, width, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    return ScoredRollout(
        prompt_ids=torch.ones(N, 1, dtype=torch.long),
        prompt_mask=torch.ones(N, 1, dtype=torch.bool),
        response_ids=torch.ones(N, width, dtype=torch.long),
        response_mask=mask_of(lengths, width),
        behavior_logprobs=zeros,
        truncated=torch.zeros(N, dtype=torch.bool),
        group_ids=torch.zeros(N, dtype=torch.long) if group_ids is None else torch.tensor(group_ids),
        version=torch.zeros(N, dtype=torch.long),
        raw_rewards=rewards,
        reward_parts=rewards.unsqueeze(1),
        rewards=rewards,
        old_logprobs=zeros if logprobs is None else logprobs.detach(),
    )


def loss_of(module, rollout, logprobs, advantages=None, ref_logprobs=None, entropy=None):
    """What the module makes of a rollout and the policy's log-probs: its own advantages, its own loss."""
    if advantages is None:
        advantages = module.compute_advantages(rollout)[0]
    fields = {**vars(rollout), "ref_logprobs": ref_logprobs, "advantages": advantages}
    return sum(module.compute_loss(Scores(logprobs, entropy), Experience(**fields)).values())


@pytest.mark.parametrize(
    ("algorithm", "loss_agg", "expected"),
    [
        (GRPO, "seq-mean-token-mean", 0.0),
        (GRPO, "token-mean", -0.5),
        (DAPO, "token-mean", -0.5),
        (GRPO, "seq-mean-token-sum-norm", -0.25),
    ],
)
def test_the_value_of_an_on_policy_loss(algorithm, loss_agg, expected):
    module = build(algorithm, loss_agg=loss_agg, sampling=SamplingConfig(max_new_tokens=4))
    logprobs = -torch.rand(2, 3, dtype=torch.float64)
    advantages = torch.tensor([[1.0] * 3, [-1.0] * 3], dtype=torch.float64)
    rollout = rollout_of([1, 0], [3, 1], logprobs=logprobs)
    assert loss_of(module, rollout, logprobs, advantages).item() == pytest.approx(expected, abs=1e-12)


def test_the_default_aggregations_are_the_papers():
    assert build(GRPO).loss_agg == "seq-mean-token-mean"
    assert build(DAPO).loss_agg == "token-mean"


def test_dapo_punishes_long_completions():
    module = build(DAPO, sampling=SamplingConfig(max_new_tokens=100), overlong_buffer=20)
    rollout = rollout_of([1, 0, 1, 0, 1], [80, 90, 100, 81, 1])
    assert module.shape_rewards(rollout).tolist() == pytest.approx([1, -0.5, 0, -0.05, 1], abs=1e-6)
    assert build(DAPO).shape_rewards(rollout).tolist() == [1, 0, 1, 0, 1]


def test_the_penalty_is_part_of_the_advantage():
    module = build(DAPO, sampling=SamplingConfig(max_new_tokens=100), overlong_buffer=20)
    rollout = rollout_of([1, 1], [80, 100])  # both right, one of them too long
    shaped = type(rollout)(**{**vars(rollout), "rewards": module.shape_rewards(rollout)})
    advantages = module.compute_advantages(shaped)[0]
    assert advantages[:, 0].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-3)


def expected_bandit_gradient(module, group_size):
    """E[-dL/dtheta] over every group of `group_size` arms of a uniform three-armed bandit with rewards 1, 0, 1/2."""
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(3, dtype=torch.float64)
    for arms in itertools.product(range(3), repeat=group_size):
        logprobs = theta.log_softmax(0)[list(arms)].unsqueeze(1)
        rollout = rollout_of([[1.0, 0.0, 0.5][arm] for arm in arms], [1] * group_size, logprobs=logprobs)
        total -= torch.autograd.grad(loss_of(module, rollout, logprobs), theta)[0] / 3**group_size
    return total.tolist()


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_the_expected_gradient_of_a_bandit(algorithm, group_size):
    """C22: RLOO is unbiased, Dr. GRPO is so up to (G - 1)/G, GRPO's own gradient is larger and no gradient of J."""
    rloo = expected_bandit_gradient(build(algorithm, advantage_estimator="rloo"), group_size)
    assert rloo == pytest.approx([1 / 6, -1 / 6, 0], abs=1e-12)

    std = expected_bandit_gradient(build(algorithm), group_size)
    first = {2: 0.1571348, 3: 0.2451408}[group_size]
    assert std == pytest.approx([first, -first, 0], abs=1e-4)  # the oracle has eps = 0


@pytest.mark.parametrize("group_size", [2, 3])
def test_the_expected_gradient_of_a_bandit_without_the_standard_deviation(group_size):
    found = expected_bandit_gradient(build(GRPO, scale_rewards="none"), group_size)
    exact = (group_size - 1) / group_size / 6
    assert found == pytest.approx([exact, -exact, 0], abs=1e-12)


THETA = torch.tensor([0.4, -0.3], dtype=torch.float64)
# the two-step language model: response tokens (1 is "a", 0 is EOS) and reward
TRAJECTORIES = [((0,), 0.2), ((1, 1), 1.0), ((1, 0), 0.0)]


def toy_logprobs(theta, trajectory):
    """`[T]`: "a" has logit theta_t against EOS."""
    return torch.stack([torch.nn.functional.logsigmoid(theta[t] if a else -theta[t]) for t, a in enumerate(trajectory)])


def reward_of_the_row(rewards, mask):
    """REINFORCE without a baseline."""
    return torch.where(mask, rewards.unsqueeze(1), 0.0), None


def expected_toy_gradient(module, rows=1, behavior=None, ref=None, on_policy=False):
    """E[-dL/dtheta] over every batch of `rows` trajectories that the behaviour policy samples."""
    theta, behavior = THETA.clone().requires_grad_(), THETA if behavior is None else behavior
    total = torch.zeros(2, dtype=torch.float64)
    for batch in itertools.product(TRAJECTORIES, repeat=rows):
        pad = lambda x: torch.nn.functional.pad(x, (0, 2 - len(x)))  # noqa: E731
        now = torch.stack([pad(toy_logprobs(theta, tokens)) for tokens, _ in batch])
        sampled = torch.stack([pad(toy_logprobs(behavior, tokens)) for tokens, _ in batch])
        reference = None if ref is None else torch.stack([pad(toy_logprobs(ref, tokens)) for tokens, _ in batch])
        old = now if on_policy else sampled
        rollout = rollout_of([R for _, R in batch], [len(tokens) for tokens, _ in batch], logprobs=old, width=2)
        loss = loss_of(module, rollout, now, ref_logprobs=reference)
        total -= float(sampled.sum().exp()) * torch.autograd.grad(loss, theta)[0]
    return total.tolist()


@pytest.mark.parametrize("algorithm", ON_POLICY)
@pytest.mark.parametrize(
    ("loss_agg", "rows", "expected"),
    [
        ("seq-mean-token-sum", 1, [0.054193, 0.146354]),  # the gradient of J
        ("seq-mean-token-sum", 2, [0.054193, 0.146354]),
        ("seq-mean-token-sum-norm", 1, [0.054193 / 2, 0.146354 / 2]),
        ("seq-mean-token-mean", 1, [0.003070, 0.073177]),
        ("token-mean", 2, [0.019498, 0.082966]),
    ],
)
def test_the_expected_gradient_of_a_two_step_language_model(algorithm, loss_agg, rows, expected):
    """C23: which aggregations are policy gradients and which are not."""
    sampling = SamplingConfig(max_new_tokens=2)
    module = build(algorithm, advantage_estimator=reward_of_the_row, loss_agg=loss_agg, sampling=sampling)
    assert expected_toy_gradient(module, rows) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("on_policy", "expected"), [(True, [0.046616, 0.160965]), (False, [0.101500, 0.110047])], ids=["no IS", "token IS"]
)
def test_the_expected_gradient_from_another_policys_samples(on_policy, expected):
    module = build(
        GRPO,
        advantage_estimator=reward_of_the_row,
        loss_agg="seq-mean-token-sum",
        clip_ratio_low=1e9,
        clip_ratio_high=1e9,
    )
    behavior = torch.tensor([-0.2, 0.5], dtype=torch.float64)
    found = expected_toy_gradient(module, behavior=behavior, on_policy=on_policy)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [0, 0]), ("k2", [0.072078, -0.058542]), ("k3", [0.073708, -0.059523])]
)
def test_the_expected_gradient_of_the_kl_term(estimator, expected):
    nothing = lambda rewards, mask: (torch.zeros(mask.shape, dtype=rewards.dtype), None)  # noqa: E731
    module = build(
        GRPO, advantage_estimator=nothing, loss_agg="seq-mean-token-sum", kl_coef=1.0, kl_estimator=estimator
    )
    found = expected_toy_gradient(module, ref=torch.tensor([0.1, 0.1], dtype=torch.float64))
    assert found == pytest.approx([-x for x in expected], abs=1e-6)  # the loss is the KL: -dL lowers it


def test_the_entropy_term_has_the_gradient_of_the_entropy():
    """dH/dz = -p (log p + H), C13 at logits [2, 1, 0]; the bonus is subtracted."""
    module = build(GRPO, entropy_coef=0.5)
    logits = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    entropy = -(log_p.exp() * log_p).sum().view(1, 1)
    logprobs = torch.zeros(1, 1, dtype=torch.float64)
    loss = loss_of(module, rollout_of([0], [1]), logprobs, torch.zeros(1, 1, dtype=torch.float64), entropy=entropy)
    assert loss.item() == pytest.approx(-0.5 * 0.8323956, abs=1e-6)
    found = torch.autograd.grad(loss, logits)[0] / -0.5
    assert found.tolist() == pytest.approx([-0.28259, 0.14077, 0.14182], abs=1e-5)


def test_the_tiny_models_of_these_tests_are_not_flat():
    logprobs = plain_logprobs(tiny_model().double(), random_experience())
    assert logprobs[logprobs != 0].std() > 0.1

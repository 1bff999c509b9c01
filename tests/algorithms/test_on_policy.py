"""The template of the on-policy algorithms: its hooks, and what composes with it."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.models.scoring import Scores
from lit_rlhf.registry import register_adv_estimator, register_policy_loss
from lit_rlhf.types import Experience, SamplingConfig
from tests.helpers import (
    EOS,
    build,
    gradients,
    plain_logprobs,
    pretend_trainer,
    prompt_rows,
    prompts,
    random_experience,
    sum_of_ids,
    tiny_model,
    trainer,
)

SHORT = SamplingConfig(max_new_tokens=5)


def collecting(algorithm=GRPO, ends=range(EOS, 12), **arguments):
    """A module in float32 whose completions end often; one round of samples."""
    module = build(algorithm, tiny_model(), **{"group_size": 4, "sampling": SHORT, **arguments})
    module.engine.end_token_ids = list(ends)
    return module


# collect


def test_collect_gives_all_that_the_updates_need():
    module = collecting(kl_coef=0.1, group_size=3)
    experience = module.collect(prompts(4, start=20))

    assert len(experience) == 12
    assert experience.group_ids.tolist() == [i for i in range(20, 24) for _ in range(3)]
    assert [row[mask].tolist() for row, mask in zip(experience.prompt_ids, experience.prompt_mask, strict=True)] == [
        ids for ids in prompts(4).prompt_ids for _ in range(3)
    ]
    logprobs = plain_logprobs(module.models.policy, experience)
    for name in ("behavior_logprobs", "old_logprobs", "ref_logprobs"):  # the reference is still the policy
        torch.testing.assert_close(getattr(experience, name).double(), logprobs, atol=1e-4, rtol=0)
    completions = [
        row[mask].tolist() for row, mask in zip(experience.response_ids, experience.response_mask, strict=True)
    ]
    R = torch.tensor(sum_of_ids(completions))
    assert (experience.raw_rewards == R).all()
    assert (experience.reward_parts == R.unsqueeze(1)).all()
    A = (R.view(4, 3) - R.view(4, 3).mean(1, keepdim=True)) / (R.view(4, 3).std(1, keepdim=True) + 1e-4)
    expected = torch.where(experience.response_mask, A.view(-1, 1), 0.0)
    torch.testing.assert_close(experience.advantages, expected, atol=1e-5, rtol=0)
    assert not experience.old_logprobs.requires_grad
    assert not experience.advantages.requires_grad
    assert experience.ref_logprobs is not None


def test_the_reference_keeps_scoring_as_it_was():
    module = collecting(kl_coef=0.1)
    before = tiny_model()
    with torch.no_grad():
        module.models.policy.lm_head.weight.mul_(1.3)
    experience = module.collect(prompts(3))
    expected = plain_logprobs(before, experience)
    torch.testing.assert_close(experience.ref_logprobs.double(), expected, atol=1e-4, rtol=0)
    assert (experience.old_logprobs - experience.ref_logprobs).abs().max() > 0.05


def test_without_kl_nothing_is_scored_by_a_reference():
    assert collecting().collect(prompts(2)).ref_logprobs is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_log_prob_is_at_the_sampling_temperature(temperature):
    sampling = SamplingConfig(max_new_tokens=5, temperature=temperature)
    module = collecting(kl_coef=0.1, sampling=sampling)
    experience = module.collect(prompts(3))
    expected = plain_logprobs(module.models.policy, experience, temperature)
    for name in ("old_logprobs", "ref_logprobs"):
        torch.testing.assert_close(getattr(experience, name).double(), expected, atol=1e-4, rtol=0)
    module.training_step(experience)
    stats = module.stats.compute()
    assert stats["stability/ratio_max"].item() == pytest.approx(1, abs=1e-4)
    assert stats["stability/approx_kl"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("truncation", [{"top_p": 0.5}, {"top_k": 3}])
def test_a_truncated_distribution_is_scored_again_by_the_policy(truncation, temperature):
    module = collecting(sampling=SamplingConfig(max_new_tokens=5, temperature=temperature, **truncation))
    experience = module.collect(prompts(3))
    expected = plain_logprobs(module.models.policy, experience, temperature)
    torch.testing.assert_close(experience.old_logprobs.double(), expected, atol=1e-4, rtol=0)
    # of the distribution sampled from, where the same token is likelier
    assert (experience.behavior_logprobs - experience.old_logprobs)[experience.response_mask].min() > -1e-4
    assert (experience.behavior_logprobs - experience.old_logprobs).max() > 0.1


def test_the_samplers_own_log_probs_are_kept_and_not_scored_again():
    module = collecting()
    module.models.score = None  # asking the policy would be an error
    experience = module.collect(prompts(3))
    assert (experience.old_logprobs == experience.behavior_logprobs).all()


@pytest.mark.parametrize("masked", [True, False])
def test_completions_that_were_cut_off_can_be_left_out_of_the_loss(masked):
    module = collecting(mask_truncated=masked)
    experience = module.collect(prompts(4))
    assert 0 < experience.truncated.sum() < len(experience)
    counts = experience.response_mask.any(1)
    assert (counts == ~experience.truncated).all() if masked else counts.all()
    # their rewards still count in the group: the same advantages as without the mask
    other = collecting().collect(prompts(4))
    kept = experience.response_mask
    assert (experience.advantages[kept] == other.advantages[kept]).all()
    assert (experience.raw_rewards == other.raw_rewards).all()


def test_rows_that_no_reward_function_applies_to_have_no_advantage():
    def some(completion_ids, **kwargs):
        return [None if i % 3 == 0 else float(i) for i in range(len(completion_ids))]

    module = collecting(reward_funcs=[some], group_size=4)
    experience = module.collect(prompts(3))
    unscored = torch.arange(12) % 3 == 0
    assert (experience.raw_rewards.isnan() == unscored).all()
    assert (experience.advantages[unscored] == 0).all()
    assert experience.advantages.isfinite().all()
    for g in range(3):
        rows = torch.arange(4 * g, 4 * g + 4)
        R = experience.raw_rewards[rows]
        R = R[~R.isnan()]
        expected = (R - R.mean()) / (R.std() + 1e-4)
        found = experience.advantages[rows][~unscored[rows], 0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    loss = module.training_step(experience)
    assert all(g.isfinite().all() for g in gradients(module, loss).values())
    assert all(torch.isfinite(value) for value in module.stats.compute().values())


def test_groups_of_equal_rewards_are_counted():
    def first_group_differs(completion_ids, **kwargs):
        return [float(i) if i < 4 else 1.0 for i in range(len(completion_ids))]

    module = collecting(reward_funcs=[first_group_differs])
    experience = module.collect(prompts(3))
    assert module.stats.compute()["reward/zero_std_fraction"].item() == pytest.approx(2 / 3)
    assert (experience.advantages[4:] == 0).all()


# hooks


class MedianDAPO(DAPO):
    """DAPO with a median baseline: robust to one lucky sample per group."""

    def compute_advantages(self, rollout):
        groups = rollout.rewards.view(-1, self.group_size)
        return rollout.spread((groups - groups.median(dim=1, keepdim=True).values).flatten()), None


def test_a_median_baseline_is_one_hook():
    module = collecting(MedianDAPO, dynamic_sampling=False)
    experience = module.collect(prompts(3))
    for g in range(3):
        rewards = sorted(experience.raw_rewards[4 * g : 4 * g + 4].tolist())
        for row in range(4 * g, 4 * g + 4):
            A = float(experience.raw_rewards[row]) - rewards[1]  # torch's median of four is the lower one
            length = int(experience.lengths[row])
            assert experience.advantages[row].tolist() == [A] * length + [0.0] * (5 - length)
    assert module.training_step(experience).isfinite()
    assert module.clip_ratio_high == 0.28


class HalvedAndWatched(GRPO):
    def shape_rewards(self, rollout):
        return rollout.rewards / 2 - 1

    def compute_loss(self, scores, batch):
        terms = super().compute_loss(scores, batch)
        return {"policy_loss": 3 * terms["policy_loss"]}


def test_shaped_rewards_are_what_advantages_are_made_of():
    module = collecting(HalvedAndWatched, scale_rewards="none")
    experience = module.collect(prompts(3))
    expected = collecting(GRPO, scale_rewards="none").collect(prompts(3))
    assert (experience.rewards == experience.raw_rewards / 2 - 1).all()
    torch.testing.assert_close(experience.advantages, expected.advantages / 2, atol=1e-6, rtol=0)
    stats = module.stats.compute()
    shaped = float(experience.raw_rewards.mean()) / 2 - 1
    assert stats["reward/shaped_reward_mean"].item() == pytest.approx(shaped, abs=1e-6)
    assert stats["reward/reward_mean"].item() == pytest.approx(float(experience.raw_rewards.mean()), abs=1e-6)


def test_the_loss_hook_decides_the_loss():
    tripled, plain = build(HalvedAndWatched), build(GRPO)
    batch = random_experience(model=plain.models.policy)
    assert tripled.training_step(batch).item() == pytest.approx(3 * plain.training_step(batch).item(), abs=1e-12)


def test_rewards_per_token_reach_the_estimator():
    class PerToken(GRPO):
        def shape_rewards(self, rollout):
            return rollout.spread(rollout.rewards)

    module = collecting(PerToken, advantage_estimator="rewards_to_go")
    experience = module.collect(prompts(2))
    row = int(experience.lengths.argmax())
    R, T = float(experience.raw_rewards[row]), int(experience.lengths[row])
    assert experience.advantages[row, :T].tolist() == pytest.approx([R * (T - t) for t in range(T)])
    shaped = (experience.raw_rewards * experience.lengths).mean()
    assert module.stats.compute()["reward/shaped_reward_mean"].item() == pytest.approx(float(shaped), abs=1e-6)


# estimators and losses by name and by callable


def test_an_estimator_and_a_loss_are_chosen_by_name():
    module = build(GRPO, advantage_estimator="rloo", policy_loss="cispo")
    batch = random_experience(model=module.models.policy)
    A = module.compute_advantages(batch)[0]
    R = batch.rewards.view(3, 2)
    assert A[:, 0].tolist() == pytest.approx((R - R.flip(1)).flatten().tolist(), abs=1e-12)
    logprobs = plain_logprobs(module.models.policy, batch)
    weight = (logprobs - batch.old_logprobs).exp().clamp(max=5.0)
    per_token = torch.where(batch.response_mask, -weight * batch.advantages * logprobs, 0.0)
    expected = (per_token.sum(1) / batch.response_mask.sum(1)).mean()
    assert module.training_step(batch).item() == pytest.approx(float(expected), abs=1e-9)


def test_the_hyper_parameters_of_the_module_reach_the_estimator_and_the_loss_by_name():
    seen = {}

    def estimator(rewards, mask, group_ids, old_logprobs, scale_rewards):
        seen["estimator"] = (scale_rewards, old_logprobs.shape)
        return torch.where(mask, rewards.unsqueeze(1), 0.0), None

    def loss(old_logp, logp, advantages, mask, clip_ratio_high):
        seen["loss"] = clip_ratio_high
        return -logp * advantages, {}

    module = build(GRPO, advantage_estimator=estimator, policy_loss=loss, clip_ratio_high=0.31, scale_rewards="none")
    batch = random_experience(model=module.models.policy)
    module.compute_advantages(batch)
    module.training_step(batch)
    assert seen == {"estimator": ("none", (6, 7)), "loss": 0.31}


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match="did you mean 'rloo'"):
        build(GRPO, advantage_estimator="rlo")
    with pytest.raises(InputError, match="did you mean 'clip'"):
        build(GRPO, policy_loss="clipp")


@register_adv_estimator("test_my_advantage")
def compute_my_advantage(rewards, mask, **kwargs):
    advantages = rewards - rewards.mean()
    returns = rewards
    return advantages, returns


@register_policy_loss("test_my_loss")
def compute_my_loss(old_logp, logp, advantages, mask, **kwargs):
    ratio = torch.exp(logp - old_logp)
    loss = -(ratio * advantages * mask).sum() / mask.sum()
    metrics = {"loss": loss.item()}
    return loss, metrics


MINE = {"advantage_estimator": "test_my_advantage", "policy_loss": "test_my_loss"}


def test_an_estimator_may_return_one_advantage_per_row():
    """The registered examples of the documentation return `[N]` for rewards `[N]`."""
    experience = collecting(**MINE).collect(prompts(3))
    R = experience.raw_rewards
    expected = torch.where(experience.response_mask, (R - R.mean()).unsqueeze(1), 0.0)
    torch.testing.assert_close(experience.advantages, expected, atol=1e-6, rtol=0)
    assert experience.returns.shape == experience.advantages.shape
    assert (experience.returns == torch.where(experience.response_mask, R.unsqueeze(1), 0.0)).all()


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (4, 1), (2, 2)])
def test_a_loss_that_returns_a_scalar_is_used_as_it_is(accumulate, world_size):
    module = pretend_trainer(build(GRPO, **MINE), accumulate, world_size)
    batch = random_experience(model=module.models.policy)

    with pytest.warns(UserWarning, match=r"returns a scalar.*return \[N, T\]"):
        loss = module.training_step(batch)
    found = gradients(module, loss)

    logprobs = module.models.score(batch).logprobs
    own = compute_my_loss(batch.old_logprobs, logprobs, batch.advantages, batch.response_mask)[0]
    assert loss.item() == pytest.approx(own.item(), abs=1e-12)
    for name, gradient in gradients(module, own).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=0)
    assert module.stats.compute()["loss/policy_loss"].item() == pytest.approx(own.item(), abs=1e-12)


def test_a_loss_may_report_numbers_of_any_shape():
    def loss(old_logp, logp, advantages, mask, **kwargs):
        per_row = torch.arange(6.0)
        return -logp * advantages, {"clip_fraction": 0.25, "ratio_out_of_range": per_row, "unheard_of": object()}

    module = build(GRPO, policy_loss=loss)
    module.training_step(random_experience(model=module.models.policy))
    stats = module.stats.compute()
    assert stats["stability/clip_fraction"] == 0.25
    assert stats["stability/ratio_out_of_range"] == 2.5


# arguments


@pytest.mark.parametrize("algorithm", [GRPO, DAPO])
@pytest.mark.parametrize("estimator", [None, "group_normalize", "rloo"])
def test_a_group_of_one_is_refused(algorithm, estimator):
    with pytest.raises(InputError, match=r"group_size=1.*needs at least 2"):
        build(algorithm, group_size=1, advantage_estimator=estimator)


def test_a_group_of_one_is_fine_for_an_estimator_without_groups():
    module = collecting(group_size=1, advantage_estimator="rewards_to_go")
    experience = module.collect(prompts(3))
    assert len(experience) == 3
    assert (experience.advantages[:, 0] == experience.raw_rewards).all()


@pytest.mark.parametrize("name", ["group_size", "prompts_per_rollout", "minibatches", "update_epochs"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        build(GRPO, **{name: 0})


def test_greedy_sampling_is_refused():
    with pytest.raises(InputError, match="temperature=0"):
        build(GRPO, sampling=SamplingConfig(temperature=0.0))


@pytest.mark.parametrize("buffer", [-1, 5, 6])
def test_an_overlong_buffer_beyond_the_completion_is_refused(buffer):
    with pytest.raises(InputError, match=f"overlong_buffer={buffer} must lie between 0 and .*=5"):
        build(DAPO, sampling=SHORT, overlong_buffer=buffer)


def test_sampling_without_rewards_is_refused():
    module = build(GRPO, reward_funcs=None, sampling=SHORT)
    with pytest.raises(InputError, match="no reward function"):
        module.collect(prompts(1))


def test_the_group_size_of_the_algorithm_replaces_that_of_the_sampling():
    module = build(GRPO, group_size=3, sampling=SamplingConfig(group_size=7))
    assert module.sampling.group_size == 3


# samples are a function of (seed, prompt), not of the batch


def test_samples_belong_to_their_prompt_and_the_seed():
    module = collecting()
    together, alone = module.collect(prompts(3)), module.collect(prompts(3))
    assert (together.response_ids == alone.response_ids).all()
    batch = prompts(3)
    second = type(batch)(batch.prompt_ids[1:2], {"prompt": batch.columns["prompt"][1:2]}, [1])
    one = module.collect(second).trim()
    rows = together[4:8].trim()
    assert (one.response_ids == rows.response_ids).all()
    twice = module.collect(type(batch)([[5, 6]] * 2, {"prompt": ["5 6"] * 2}, [0, 1]))
    assert (twice.response_ids[:4] != twice.response_ids[4:]).any(), "one prompt met again is sampled afresh"
    module.seed = 1
    assert (module.collect(prompts(3)).trim().response_ids.shape != together.trim().response_ids.shape) or (
        module.collect(prompts(3)).response_ids != together.response_ids
    ).any()


def test_entropy_and_kl_are_only_in_the_loss_when_asked_for():
    module = build(GRPO)
    batch = replace(random_experience(model=module.models.policy), ref_logprobs=None)
    scores = Scores(batch.old_logprobs, torch.ones_like(batch.old_logprobs))
    assert list(module.compute_loss(scores, batch)) == ["policy_loss"]
    module = build(GRPO, kl_coef=0.1, entropy_coef=0.1)
    terms = module.compute_loss(scores, random_experience(model=module.models.policy))
    assert list(terms) == ["policy_loss", "kl_loss", "entropy_loss"]
    assert float(terms["entropy_loss"]) == pytest.approx(-0.1)
    assert isinstance(batch, Experience)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kl_coef": float("nan")}, "algo.kl_coef must be a finite number"),
        ({"kl_coef": -1.0}, "algo.kl_coef must be at least 0"),
        ({"clip_ratio_low": -0.1}, "algo.clip_ratio_low must be at least 0"),
        ({"clip_ratio_high": -0.1}, "algo.clip_ratio_high must be at least 0"),
        ({"warmup_steps": -1}, "algo.warmup_steps must be at least 0"),
        ({"weight_decay": -0.1}, "algo.weight_decay must be at least 0"),
        ({"lr": 0.0}, "algo.lr must be above 0"),
        ({"betas": (0.9,)}, "algo.betas must be two numbers"),
        ({"betas": (0.9, 1.5)}, "algo.betas must be two numbers"),
        ({"minibatches": 0}, "algo.minibatches must be at least 1"),
    ],
)
@pytest.mark.parametrize("algorithm", [GRPO, DAPO])
def test_numbers_that_cannot_be_are_refused_with_a_sentence(algorithm, arguments, sentence):
    with pytest.raises(InputError) as caught:
        build(algorithm, **arguments)
    assert sentence in str(caught.value)


def test_dapo_needs_a_round():
    with pytest.raises(InputError, match=r"algo\.max_rounds must be at least 1"):
        build(DAPO, max_rounds=0)


@pytest.mark.parametrize("arguments", [{"kl_coef": 0.1, "kl_estimator": "k1"}, {"sampling": {"top_p": 0.9}}])
def test_settings_that_train_something_else_than_they_seem_to_are_warned_of(arguments):
    with pytest.warns(UserWarning, match=r"algo\.kl_estimator=k1|rollout\.top_p"):
        build(GRPO, **arguments)


def test_a_limit_that_would_cut_rollouts_in_pieces_is_refused():
    fitter = trainer(limit_train_batches=1)
    with pytest.raises(InputError, match=r"trainer\.limit_train_batches=1 would cut rollouts in pieces"):
        fitter.fit(build(GRPO, group_size=2, prompts_per_rollout=2), datamodule=RowsDataModule(prompt_rows(4)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_at_any_precision_the_ratio_of_a_fresh_sample_is_one(precision):
    ratios = []

    class Watched(GRPO):
        def publish(self, stats, extra=None):
            values = stats.compute()
            ratios.append((float(values["stability/ratio_min"]), float(values["stability/ratio_max"])))
            super().publish(stats, extra)

    module = build(Watched, tiny_model(), group_size=2, prompts_per_rollout=8, sampling={"max_new_tokens": 8})
    trainer(epochs=2, precision=precision).fit(module, datamodule=RowsDataModule(prompt_rows(16)))
    assert ratios == [(pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4))] * 2


def test_the_learning_rate_ends_with_whichever_limit_comes_first():
    sizes = {"group_size": 2, "prompts_per_rollout": 2, "sampling": {"max_new_tokens": 2}}
    module = build(GRPO, lr=1e-3, lr_schedule="linear", **sizes)
    fitter = trainer(epochs=50, max_steps=3)
    fitter.fit(module, datamodule=RowsDataModule(prompt_rows(8)))
    assert module.total_steps == fitter.global_step == 3
    assert fitter.optimizers[0].param_groups[0]["lr"] == 0

"""An engine that computes otherwise than the policy: scored again, measured, weighed once (A9: truncated, C = 2)."""

import math
from types import SimpleNamespace

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.registry import register_policy_loss
from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.rollouts.importance import ImportanceCorrection
from lit_rlhf.rollouts.sampler import end_token_ids
from tests.helpers import build, gradients, plain_logprobs, pretend_trainer, prompt_rows, prompts, tiny_model, trainer


class OtherArithmetic(TransformersEngine):
    """Its log-probs are off by what another kernel might make of them, far more than any does."""

    exact_logprobs = False

    def generate(self, prompt_ids, sampling, seed):
        rollout = super().generate(prompt_ids, sampling, seed)
        g = torch.Generator().manual_seed(5)
        noise = torch.randn(rollout.behavior_logprobs.shape, generator=g).to(rollout.behavior_logprobs.dtype)
        noise[0, :3] = torch.tensor([-1.6, 1.6, 0.0])  # ratios of 4.95 and 0.20
        rollout.behavior_logprobs.add_(0.4 * noise * rollout.response_mask)
        return rollout


SMALL = {"group_size": 2, "prompts_per_rollout": 4, "sampling": {"max_new_tokens": 5, "temperature": 0.8}}


def made(algorithm=GRPO, engine=OtherArithmetic, **arguments):
    module = build(algorithm, tiny_model().double(), engine=engine, **{**SMALL, **arguments})
    module.engine.end_token_ids = list(range(1, 12))
    return pretend_trainer(module)


def collected(module):
    experience = module.collect(prompts(4))
    scored = plain_logprobs(module.models.policy, experience, temperature=0.8)
    return experience, scored


def by_hand(scored, experience):
    """Token weights min(pi_old / pi_b, 2), and the mean and greatest |difference| and mean KL by k3, in loops."""
    weights, differences, kls = torch.ones_like(scored), [], []
    for i, t in experience.response_mask.nonzero().tolist():
        gap = float(scored[i, t] - experience.behavior_logprobs[i, t])
        weights[i, t] = min(math.exp(gap), 2.0)
        differences.append(abs(gap))
        kls.append(math.exp(gap) - 1 - gap)
    return weights, sum(differences) / len(differences), max(differences), sum(kls) / len(kls)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_policy_scores_again_and_its_own_numbers_are_old(minibatches):
    """With one step the step's own forward pass does, with several one beforehand."""
    module = made(minibatches=minibatches)
    module.prompts = SimpleNamespace(rows=[None])  # as in a fit: nobody but the update reads the experience
    experience, scored = collected(module)
    if minibatches == 1:
        assert experience.unscored.all()
        assert experience.old_logprobs.isnan().all()
    else:
        torch.testing.assert_close(experience.old_logprobs.double(), scored, atol=1e-6, rtol=0)
    assert float((experience.behavior_logprobs - scored)[experience.response_mask].abs().max()) > 0.3
    module.training_step(experience)
    found = module.pop_metrics()
    assert found["approx_kl"] == pytest.approx(0, abs=1e-12)
    assert (found["ratio_min"], found["ratio_max"]) == pytest.approx((1, 1))


def test_the_mismatch_is_measured():
    module = made()
    experience, scored = collected(module)
    _, mean, highest, kl = by_hand(scored, experience)
    module.pop_metrics()
    module.training_step(experience)
    found = module.pop_metrics()
    assert found["logprob_mismatch_mean"] == pytest.approx(mean, rel=1e-6)
    assert found["logprob_mismatch_max"] == pytest.approx(highest, rel=1e-6)
    assert found["mismatch_kl"] == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize("algorithm", [GRPO, REINFORCE])
def test_rows_weigh_the_truncated_ratio_and_only_once(algorithm):
    """The gradient is that of the per-token loss times min(pi / pi_b, 2); no lower limit."""
    module, plain = made(algorithm), made(algorithm, importance_correction="none")
    experience, scored = collected(module)
    weights, *_ = by_hand(scored, experience)
    mask = experience.response_mask
    assert (weights[mask] < 0.4).any()
    assert (weights == 2.0).any()
    found = gradients(module, module.training_step(experience))
    expected = gradients(plain, plain.training_step(replace_advantages(experience, weights)))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)  # behaviour is float32
    metrics = module.pop_metrics()
    assert metrics["is_ratio_max"] == pytest.approx(float((scored - experience.behavior_logprobs)[mask].exp().max()))
    assert metrics["clipped_fraction"] == pytest.approx(float((weights[mask] == 2.0).double().mean()))


def replace_advantages(experience, weights):
    """On-policy both losses are proportional to the advantage: the weight may as well be the advantage's."""
    fields = {**vars(experience), "advantages": experience.advantages * weights}
    return type(experience)(**fields)


def test_without_correction_it_is_measured_and_the_old_log_probs_are_still_the_policys():
    module = made(importance_correction="none")
    experience, scored = collected(module)
    torch.testing.assert_close(experience.old_logprobs.double(), scored, atol=1e-6, rtol=0)
    module.training_step(experience)
    found = module.pop_metrics()
    assert found["logprob_mismatch_mean"] > 0.1
    assert "is_ratio_mean" not in found


def test_stale_rows_keep_both_of_their_limits():
    module = made()
    experience, _ = collected(module)
    experience.staleness[::2] = 1
    weights, cells = module.importance(experience.old_logprobs, experience)
    ratio = (experience.old_logprobs - experience.behavior_logprobs).exp()
    mask = experience.response_mask
    stale = torch.zeros_like(mask)
    stale[::2] = True
    torch.testing.assert_close(weights[mask & stale], ratio.clamp(0.5, 2.0)[mask & stale] * 0.99)
    torch.testing.assert_close(weights[mask & ~stale], ratio.clamp(max=2.0)[mask & ~stale])
    outside, counted = cells["stability/clipped_fraction"]
    assert bool((outside.bool() == ((ratio > 2) | ((ratio < 0.5) & stale)))[counted].all())


def test_an_exact_engine_is_neither_measured_nor_weighed():
    module = made(engine=TransformersEngine)
    assert module.importance.exact_engine
    experience, _ = collected(module)
    assert module.importance(experience.old_logprobs, experience)[1]["stability/is_ratio"][1].sum() == 0
    module.training_step(experience)
    assert "logprob_mismatch_mean" not in module.pop_metrics()


def test_a_scalar_loss_cannot_be_weighed():
    @register_policy_loss("a scalar of an engine's rows")
    def scalar(old_logp, logp, advantages, mask, **kwargs):
        return -(logp * advantages)[mask].mean(), {}

    module = made(policy_loss="a scalar of an engine's rows")
    experience, _ = collected(module)
    with pytest.raises(ValueError, match="a scalar cannot be weighed by the importance of its rows"):
        module.training_step(experience)


def test_a_run_logs_it_and_an_engine_may_be_given_as_it_is():
    model = tiny_model()
    engine = OtherArithmetic(end_token_ids(model, build(GRPO, model).tokenizer, ()), 0)
    module = build(GRPO, model, engine=engine, **SMALL)
    assert module.engine is engine
    fit = trainer(epochs=1)
    published = {}
    module.publish = lambda stats, extra=None: published.update(stats.compute())
    fit.fit(module, datamodule=RowsDataModule(prompt_rows(8)))
    assert published["stability/mismatch_kl"] > 0
    assert published["stability/logprob_mismatch_max"] > 1.0


def test_by_hand_numbers():
    """w of 0.2, 1 and 5, none of them stale: 0.2, 1 and 2 (C10)."""
    module = made()
    experience, _ = collected(module)
    rows = experience[torch.tensor([0])]
    rows.response_mask[:], rows.behavior_logprobs[:] = False, 0.0
    rows.response_mask[0, :3] = True
    now = torch.zeros_like(rows.behavior_logprobs)
    now[0, :3] = torch.tensor([0.2, 1.0, 5.0], dtype=now.dtype).log()
    correction = ImportanceCorrection("auto")
    correction.exact_engine = False
    weights, _ = correction(now, rows)
    assert weights[0, :3].tolist() == pytest.approx([0.2, 1.0, 2.0])

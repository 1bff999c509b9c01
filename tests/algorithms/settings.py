"""Every on-policy algorithm as the tests try it, with all of its terms at work, and what they compare."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.cispo import CISPO
from lit_rlhf.algorithms.conservative_ppo import ConservativePPO
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.dr_grpo import DrGRPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.reinforce_pp import REINFORCEPlusPlus
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.types import ScoredRollout
from tests.helpers import as_completions, build, gradients, plain_logprobs, random_experience

AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
KL, ENTROPY = {"kl_coef": 0.3, "kl_in": "loss"}, {"entropy_coef": 0.1}
TERMS = {**KL, **ENTROPY}
CONSERVATIVE = {"conservative_coef": 2.0, "max_kl_divergence": 0.02}

SETTINGS = {
    "GRPO": (GRPO, TERMS),
    "GRPO full KL": (GRPO, {**TERMS, "kl_estimator": "full"}),
    "GRPO unbiased KL": (GRPO, {**TERMS, "kl_unbiased": True}),
    "GRPO stale": (GRPO, TERMS),
    "DAPO": (DAPO, TERMS),
    "DrGRPO": (DrGRPO, TERMS),
    "PPO": (PPO, {**TERMS, "kl_in": "both", "value": "separate"}),
    "PPO shared": (PPO, {**TERMS, "value": "shared", "dual_clip": 1.3, "value_coef": 0.1}),
    "PPO plain values": (PPO, {"value": "shared", "value_clip": None}),
    "ConservativePPO": (ConservativePPO, {**CONSERVATIVE, **ENTROPY, "value": "shared"}),
    "ConservativePPO k2": (ConservativePPO, {**CONSERVATIVE, **TERMS, "penalty_kl": "k2", "value": "separate"}),
    "GSPO": (GSPO, {**TERMS, "clip_ratio_low": 0.05, "clip_ratio_high": 0.08}),
    "GSPO-token": (GSPO, {**TERMS, "clip_ratio_low": 0.05, "clip_ratio_high": 0.08, "policy_loss": "gspo_token"}),
    "RLOO": (RLOO, TERMS),
    "RLOO clipped": (RLOO, {**TERMS, "policy_loss": "sequence_clip", "loss_agg": "seq-mean-token-mean"}),
    "REINFORCE": (REINFORCE, TERMS),
    "REINFORCE++": (REINFORCEPlusPlus, ENTROPY),
    "REINFORCE++ baseline": (REINFORCEPlusPlus, {**TERMS, "group_baseline": True, "kl_estimator": "k2"}),
    "ReMax": (ReMax, TERMS),
    "CISPO": (CISPO, {**TERMS, "clip_max": 1.2}),
    "ImportanceSampling": (ImportanceSampling, {**TERMS, "clip_ratio": 1.3}),
    "ImportanceSampling by sequence": (ImportanceSampling, {**TERMS, "importance_correction": "sequence"}),
    "ImportanceSampling by sums": (ImportanceSampling, {**TERMS, "staleness_decay": 0.9}),
}
ON_POLICY = list(SETTINGS)
ON_POLICY_CLASSES = list(dict.fromkeys(algorithm for algorithm, _ in SETTINGS.values()))


def other_weights(model, scale, seed):
    """Move every weight of a model a little."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))


def module_of(name, **changes):
    """The module of a setting in float64, its reference and its value function other than the policy."""
    algorithm, arguments = SETTINGS[name]
    return with_other_models(build(algorithm, **{**arguments, **changes}))


def with_other_models(module):
    if module.models.reference is not None:
        other_weights(module.models.reference, 0.03, seed=1)
    if module.models.value_head is not None:
        other_weights(module.models.value_head, 0.05, seed=2)
    if module.models.value_trunk is not None:
        other_weights(module.models.value_trunk, 0.03, seed=3)
    return module


def rows_for(name, model, lengths=(3, 7, 1, 5, 2, 6), prompt_lengths=(2, 5, 1, 4, 5, 3)):
    """Uneven rows with values, returns and ages, about the log-probs of `model`."""
    rows = random_experience(lengths, prompt_lengths, model=model)
    g = torch.Generator().manual_seed(5)
    noise = lambda: torch.randn(rows.response_mask.shape, generator=g, dtype=torch.float64)  # noqa: E731
    stale = torch.arange(len(rows)) * 5 % 4
    rows = replace(
        rows,
        values=0.3 * noise(),
        returns=noise(),
        bootstrap=torch.where(rows.truncated, 0.4, 0.0).double(),
        baseline=noise()[:, 0],
        staleness=stale if name == "GRPO stale" or name.startswith("Importance") else torch.zeros_like(stale),
    )
    if name.endswith("by sums"):
        rows = replace(rows, behavior_logprobs=rows.behavior_logprobs.where(rows.response_mask, 0.0).sum(1))
    return rows


def setting(name, **changes):
    """A module and six uneven rows for it."""
    module = module_of(name, **changes)
    return module, rows_for(name, module.models.policy)


def demonstrations():
    """The same of SFT."""
    module = build(SFT)
    return module, as_completions(random_experience(model=module.models.policy))


def setting_or_sft(name):
    return demonstrations() if name == "SFT" else setting(name)


def rollout_from(rows):
    """The rows as they come out of the sampler: no advantages yet."""
    kept = set(ScoredRollout.__dataclass_fields__) - {"ref_logprobs", "values", "bootstrap"}
    return ScoredRollout(**{name: getattr(rows, name) for name in kept})


def on_policy_rows(module):
    """Rows whose old and reference policies are the module's own."""
    batch = random_experience(model=module.models.policy)
    logprobs = plain_logprobs(module.models.policy, batch)
    return replace(batch, old_logprobs=logprobs, ref_logprobs=logprobs)


def split(batch, parts):
    """Micro-batches of one step, each with the counts of the whole."""
    counts = {"step_tokens": batch.response_mask.sum(), "step_rows": batch.response_mask.any(1).sum()}
    return [replace(batch[torch.tensor(rows)], **counts) for rows in parts]


SPLITS = {
    "even": [[0, 1, 2], [3, 4, 5]],
    "uneven": [[5, 0], [2], [1, 3, 4]],
    "one by one": [[0], [1], [2], [3], [4], [5]],
}


def take_stats(module):
    values = {name: float(value) for name, value in module.stats.compute().items()}
    module.stats.reset()
    return values


def loss_gradients_stats(module, *batches):
    """Of one optimiser step made of these micro-batches."""
    module.begin_step(batches)
    losses = [module.training_step(batch) for batch in batches]
    return sum(losses).item(), gradients(module, *losses), take_stats(module)


def assert_stats_equal(found, expected, without=()):
    assert found.keys() == expected.keys()
    assert any(value != 0 for value in expected.values())
    for name in expected.keys() - set(without):
        assert found[name] == pytest.approx(expected[name], abs=1e-9), name

"""Validation: greedy and sampled completions of held-out prompts, and what is logged of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from lit_rlhf.functional import kl_estimate
from lit_rlhf.metrics import Cells
from lit_rlhf.rollouts.engines import has_exact_logprobs
from lit_rlhf.rollouts.measures import measures
from lit_rlhf.rollouts.sampler import VALIDATION, decode, scored
from lit_rlhf.types import PromptBatch, SamplingConfig, ScoredRollout

if TYPE_CHECKING:
    from lit_rlhf.algorithms.base import RLHFModule

# what is not the mean of its cells alone; accuracy has one cell per prompt, so that its interval is by prompt
VALIDATION_STATS: Mapping[str, tuple[str, ...]] = {"val/accuracy_sampled": ("value", "ci")}


def validation_stats(module: RLHFModule, prompts: PromptBatch) -> Cells:
    """`{name: (values, mask)}` of greedy and of sampled completions of these prompts, judged by `module.judges`.

    A filler counts for nothing: it is there for the collectives of a sharded model.
    """
    greedy = replace(module.sampling, temperature=0.0, group_size=1)
    sampled = replace(module.sampling, group_size=module.validation_samples)
    cells = {**_judged(module, prompts, greedy, "greedy"), **_judged(module, prompts, sampled, "sampled")}
    return {name: (values, mask & (not prompts.filler)) for name, (values, mask) in cells.items()}


def _judged(
    module: RLHFModule, prompts: PromptBatch, sampling: SamplingConfig, how: str
) -> dict[str, tuple[Tensor, Tensor]]:
    G = sampling.group_size
    rollout = scored(module.tokenizer, module.judges, prompts, module.generate(prompts, sampling, VALIDATION), G)
    completions = decode(module.tokenizer, rollout)
    found = measures(rollout, module.judges, completions, G, [G] if G > 1 and how == "sampled" else [])
    if "accuracy" in found:
        found["accuracy"] = found["accuracy"].view(-1, G).nanmean(1)
    of_prompts = {f"val/{name}": x for name, x in found.items() if "_at_" in name}
    of_either = {f"val/{name}_{how}": x for name, x in found.items() if f"val/{name}" not in of_prompts}
    cells = {name: (x, ~x.isnan()) for name, x in {**of_either, **of_prompts}.items()}
    if how == "sampled" and sampling.temperature > 0 and module.models.has_reference:
        cells["val/kl_divergence"] = (_kl(module, rollout, sampling), rollout.response_mask)
    return cells


def _kl(module: RLHFModule, rollout: ScoredRollout, sampling: SamplingConfig) -> Tensor:
    """KL(policy, reference) of every sampled token `[N, T]`, by k3."""
    models, temperature = module.models, sampling.temperature
    now = rollout.behavior_logprobs
    if sampling.truncates_distribution or not has_exact_logprobs(module.engine):
        now = models.score(rollout, temperature=temperature).logprobs
    return kl_estimate(now, models.score_reference(rollout, temperature=temperature).logprobs, "k3")

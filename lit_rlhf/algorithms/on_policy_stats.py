"""What the on-policy algorithms log: names, and which cells of which tensors go into them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.functional import approx_kl, kl_estimate
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.functional.policy_losses import policy_ratio
from lit_rlhf.metrics import Cells
from lit_rlhf.models.scoring import Scores
from lit_rlhf.ranks import sum_over_ranks
from lit_rlhf.rewards import TrainerState
from lit_rlhf.rollouts.dynamic_sampling import alone, informative
from lit_rlhf.rollouts.importance import IMPORTANCE_STATS
from lit_rlhf.types import Experience, PromptBatch, ScoredRollout

if TYPE_CHECKING:
    from lit_rlhf.algorithms.on_policy import OnPolicyModule

RATIO_BINS = (0.0, 2.0, 41)  # of policy / old policy, with 1 in the middle of a bin

# Counted over the completions with a reward, for the correlation, and not logged.
_LENGTH, _WITH_LENGTH = "reward/length", "reward/reward_plus_length"

ON_POLICY_STATS: Mapping[str, tuple[str, ...]] = {
    "loss/loss": ("value",),
    "loss/policy_loss": ("value",),
    "loss/kl_loss": ("value",),
    "loss/entropy_loss": ("value",),
    "loss/value_loss": ("value",),
    "stability/entropy": ("value",),
    "stability/approx_kl": ("value",),
    "stability/approx_kl_k1": ("value",),
    "stability/kl_divergence": ("value",),
    "stability/kl_coef": ("value",),
    "stability/stopped_fraction": ("value",),
    "stability/clip_fraction": ("value",),
    "stability/clip_fraction_low": ("value",),
    "stability/clip_fraction_high": ("value",),
    "stability/ratio_out_of_range": ("value",),
    "stability/ratio": ("mean", "max", "min"),
    "stability/logprob_mismatch": ("mean", "max"),
    "stability/mismatch_kl": ("value",),
    "stability/advantage": ("mean", "std"),
    "stability/value": ("mean",),
    "stability/value_error": ("std",),
    "stability/value_clip_fraction": ("value",),
    "stability/return": ("mean", "std"),
    **IMPORTANCE_STATS,
    "stability/grad_norm": ("value",),
    "stability/skipped_fraction": ("value",),
    "reward/reward": ("mean", "std"),
    "reward/shaped_reward": ("mean",),
    "reward/accuracy": ("value",),
    "reward/zero_std_fraction": ("value",),
    "reward/singleton_fraction": ("value",),
    _LENGTH: ("std",),
    _WITH_LENGTH: ("std",),
    "rollout/response_length": ("value", "max"),
    "rollout/truncated_fraction": ("value",),
    "rollout/staleness": ("value", "max"),
}


def sample_stats(sampled: ScoredRollout, accuracy: Tensor | None, group_size: int) -> Cells:
    """Of all that was sampled, also what dynamic sampling then leaves out."""
    found = {
        "reward/reward": sampled.raw_rewards,
        "rollout/response_length": sampled.lengths.float(),
        _LENGTH: sampled.lengths + 0 * sampled.raw_rewards,  # NaN without a reward
        _WITH_LENGTH: sampled.lengths + sampled.raw_rewards,
        "rollout/truncated_fraction": sampled.truncated.float(),
    }
    if group_size > 1:
        found["reward/zero_std_fraction"] = (~informative(sampled)).float()
        found["reward/singleton_fraction"] = alone(sampled).float()
    if accuracy is not None:
        found["reward/accuracy"] = accuracy
    return {name: (value, ~value.isnan()) for name, value in found.items()}


def tell(module: OnPolicyModule, prompts: PromptBatch) -> None:
    """Tell the reward functions where training stands when these prompts are sampled."""
    if module.rewards is None:
        return
    passes, epochs, steps = 0.0, 0, module.total_steps
    if module.prompts is not None:
        count = len(module.prompts.rows)
        passes = (prompts.index[0] - module.rank * len(prompts)) / count  # of all ranks
        if steps is not None:
            steps_of_rollout = -(-int(module.trainer.num_training_batches) // module.accumulate)
            epochs = math.ceil(steps * module.prompts_per_rollout / (steps_of_rollout * count))
    module.rewards.trainer_state = TrainerState(
        global_step=module.global_step,
        epoch=passes,
        max_steps=steps or -1,
        num_train_epochs=epochs,
        is_world_process_zero=module.rank == 0,
    )


def count_rewards(module: OnPolicyModule, sampled: ScoredRollout) -> None:
    """Count each reward function on its own, over all that was sampled, and what the functions logged themselves."""
    if module.rewards is None:
        return
    names = [f"rewards/{name}" for name in module.rewards.names]
    module.stats.extend(names, ("value", "std"))
    module.count({name: (x, ~x.isnan()) for name, x in zip(names, sampled.reward_parts.unbind(1), strict=True)})
    logged = {f"rewards/{name}": torch.tensor(values) for name, values in module.rewards.metrics.items()}
    module.count({name: (values, ~values.isnan()) for name, values in logged.items()})


def warn_of_no_rewards(module: OnPolicyModule, rollout: ScoredRollout) -> None:
    """Warn where no completion of a rollout has a reward, on any rank: nothing is learnt from it."""
    if not bool(sum_over_ranks((~rollout.raw_rewards.isnan()).sum())) and module.rank == 0 and module.rewards:
        names = ", ".join(module.rewards.names)
        warnings.warn(
            f"no completion of a rollout has a reward, and nothing is learnt from it: the reward functions ({names}) "
            "returned None for every one, but for those of weight 0",
            stacklevel=2,
        )  # Python shows it once


def rollout_stats(batch: Experience) -> dict[str, tuple[Tensor | float, Tensor | None]]:
    """Of what is trained on; filler rows count as nothing."""
    shaped, mask = batch.rewards, batch.response_mask
    counts = mask.any(1)
    if shaped.ndim == 2:
        shaped = zero_outside(shaped, mask).sum(1)
    found: dict[str, tuple[Tensor | float, Tensor | None]] = {
        "reward/shaped_reward": (shaped, counts & ~shaped.isnan())
    }
    if batch.staleness is not None:
        found["rollout/staleness"] = (batch.staleness.float(), counts)
    if batch.values is not None and batch.returns is not None:
        scored = mask & ~batch.raw_rewards.isnan().unsqueeze(1)  # the others' return is their value
        error = zero_outside(batch.returns, mask) - zero_outside(batch.values, mask)
        found |= {"stability/value": (batch.values, scored), "stability/return": (batch.returns, scored)}
        found["stability/value_error"] = (error, scored)
    return found


def update_stats(scores: Scores, batch: Experience) -> dict[str, tuple[Tensor, Tensor]]:
    """Of a micro-batch, token by token, before the step it belongs to."""
    mask, new, old = batch.response_mask, scores.logprobs.detach(), batch.old_logprobs
    found = {
        "approx_kl": approx_kl(new, old, "k3"),
        "approx_kl_k1": approx_kl(new, old, "k1"),
        "ratio": policy_ratio(new, old),
        "advantage": batch.advantages,
    }
    if scores.entropy is not None:
        found["entropy"] = scores.entropy.detach()
    if scores.kl is not None:
        found["kl_divergence"] = scores.kl.detach()
    elif batch.ref_logprobs is not None:
        found["kl_divergence"] = kl_estimate(new, batch.ref_logprobs, "k3")
    return {f"stability/{name}": (value, mask) for name, value in found.items()}


def mismatch_stats(batch: Experience) -> dict[str, tuple[Tensor, Tensor]]:
    """How far an engine's log-probs are from those that the policy scores, in rows sampled by the policy's weights."""
    old, behavior = batch.old_logprobs, batch.behavior_logprobs
    fresh = batch.response_mask
    if batch.staleness is not None:
        fresh = fresh & (batch.staleness == 0).unsqueeze(1)
    found = {
        "logprob_mismatch": (zero_outside(old, fresh) - zero_outside(behavior, fresh)).abs(),
        "mismatch_kl": kl_estimate(zero_outside(behavior, fresh), zero_outside(old, fresh), "k3"),
    }
    return {f"stability/{name}": (value, fresh) for name, value in found.items()}


def loss_stats(
    metrics: Mapping[str, Any], mask: Tensor, known: Mapping[str, Any]
) -> dict[str, tuple[Tensor | float, Tensor | None]]:
    """What a policy loss reports: tensors `[N, T]`, `[N]` or numbers; names of its own go under `policy/`."""
    found: dict[str, tuple[Tensor | float, Tensor | None]] = {}
    for name, value in metrics.items():
        if isinstance(value, (Tensor, int, float)):
            cells = torch.as_tensor(value).detach()
            section = "stability" if f"stability/{name}" in known else "policy"
            found[f"{section}/{name}"] = (cells, mask if cells.shape == mask.shape else None)
    return found


def with_length_correlation(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the correlation of reward and length: Var(r + l) = Var(r) + Var(l) + 2 Cov(r, l). It is 0 of a constant."""
    length, both = (values.pop(f"{name}_std", None) for name in (_LENGTH, _WITH_LENGTH))
    reward = values.get("reward/reward_std")
    if reward is None or length is None or both is None:
        return values
    product = 2 * reward * length
    ratio = (both.square() - reward.square() - length.square()) / torch.where(product > 0, product, 1.0)
    return {**values, "reward/length_correlation": torch.where(product > 0, ratio.clamp(-1, 1), 0.0)}


def explained(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the explained variance, 1 - Var(return - value) / Var(return); 0 where the returns do not vary."""
    total, error = (values.get(f"stability/{name}_std") for name in ("return", "value_error"))
    if total is None or error is None:
        return values
    ratio = error / torch.where(total > 0, total, 1.0)
    return {**values, "stability/explained_variance": torch.where(total > 0, 1 - ratio.square(), 0.0)}

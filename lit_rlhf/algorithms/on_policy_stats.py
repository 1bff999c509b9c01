"""What the on-policy algorithms log: names, and which cells of which tensors go into them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lit_rlhf.functional import approx_kl, kl_estimate
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.functional.policy_losses import policy_ratio
from lit_rlhf.models.scoring import Scores
from lit_rlhf.rollouts.dynamic_sampling import informative
from lit_rlhf.types import Experience, ScoredRollout

Cells = dict[str, tuple[Tensor, Tensor | None]]  # name -> values and the mask of those that count

ON_POLICY_STATS: Mapping[str, tuple[str, ...]] = {
    "loss/loss": ("value",),
    "loss/policy_loss": ("value",),
    "loss/kl_loss": ("value",),
    "loss/entropy_loss": ("value",),
    "stability/entropy": ("value",),
    "stability/approx_kl": ("value",),
    "stability/approx_kl_k1": ("value",),
    "stability/kl_divergence": ("value",),
    "stability/clip_fraction": ("value",),
    "stability/clip_fraction_low": ("value",),
    "stability/clip_fraction_high": ("value",),
    "stability/ratio_out_of_range": ("value",),
    "stability/ratio": ("mean", "max", "min"),
    "stability/advantage": ("mean", "std"),
    "stability/grad_norm": ("value",),
    "reward/reward": ("mean", "std"),
    "reward/shaped_reward": ("mean",),
    "reward/accuracy": ("value",),
    "reward/zero_std_fraction": ("value",),
    "rollout/response_length": ("value", "max"),
    "rollout/truncated_fraction": ("value",),
    "rollout/staleness": ("value", "max"),
}


def sample_stats(sampled: ScoredRollout, accuracy: Tensor | None) -> Cells:
    """Of all that was sampled, also what dynamic sampling then leaves out."""
    found = {
        "reward/reward": sampled.raw_rewards,
        "reward/zero_std_fraction": (~informative(sampled)).float(),
        "rollout/response_length": sampled.lengths.float(),
        "rollout/truncated_fraction": sampled.truncated.float(),
    }
    if accuracy is not None:
        found["reward/accuracy"] = accuracy
    return {name: (value, ~value.isnan()) for name, value in found.items()}


def rollout_stats(rollout: ScoredRollout, iteration: int) -> Cells:
    """Of what is trained on; filler rows count as nothing."""
    shaped, counts = rollout.rewards, rollout.response_mask.any(1)
    if shaped.ndim == 2:
        shaped = zero_outside(shaped, rollout.response_mask).sum(1)
    found = {"reward/shaped_reward": shaped, "rollout/staleness": (iteration - rollout.version).float()}
    return {name: (value, counts & ~value.isnan()) for name, value in found.items()}


def update_stats(scores: Scores, batch: Experience) -> Cells:
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
    if batch.ref_logprobs is not None:
        found["kl_divergence"] = kl_estimate(new, batch.ref_logprobs, "k3")
    return {f"stability/{name}": (value, mask) for name, value in found.items()}

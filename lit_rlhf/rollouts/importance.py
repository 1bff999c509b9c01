"""Importance correction: what data sampled by other weights is multiplied by (ALGORITHMS A9, decision D11).

    w = clip( exp(lp - lp_b), clip_min, clip_max ) * decay^gap        detached, outside of any clip, per token

lp_b is the policy that sampled. A loss with a ratio to pi_old corrects from pi_old to pi_theta itself, so lp is
pi_old there, the proximal policy of the decoupled objective (arXiv 2110.00641); a score-function loss, -A lp, has no
ratio, so lp is pi_theta. Nothing is corrected twice. At the level of sequences the exponent is the sum over the
completion's tokens: exact, with more variance.

An engine that computes otherwise than the policy samples from another distribution even with the same weights. Rows of
its that are not stale weigh min(exp(lp - lp_b), clip_max): truncated importance sampling (Yao et al. 2025, "Your
efficient RL framework secretly brings you off-policy RL training"; Espeholt et al., arXiv 1802.01561).
"""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
from torch import Tensor

from lit_rlhf.errors import InputError, check_choice, check_number
from lit_rlhf.functional import importance_weights
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.functional.policy_losses import policy_ratio
from lit_rlhf.metrics import Cells
from lit_rlhf.types import Experience

Level = Literal["auto", "none", "token", "sequence"]
IMPORTANCE_STATS = {
    "stability/is_ratio": ("mean", "max", "min"),
    "stability/ess": ("ess",),
    "stability/clipped_fraction": ("value",),
    "stability/behavior_kl": ("value",),
}


class ImportanceArgs(TypedDict, total=False):
    """The keyword arguments of `ImportanceCorrection`."""

    importance_clip_min: float
    importance_clip_max: float
    staleness_decay: float


class ImportanceCorrection:
    """Weights and metrics of stale rows.

    Args:
        importance_correction: `"token"` or `"sequence"` for all rows, `"none"`, or `"auto"`: per token for rows that
            older weights sampled, and for all of an engine whose log-probs are not exactly the policy's. Rows whose
            behaviour log-probs are known as a sum only are corrected by sequence.
        importance_clip_min: least weight, before the decay; with `"auto"` of stale rows alone.
        importance_clip_max: greatest weight.
        staleness_decay: factor per rollout between the sampling weights and those trained.
    """

    def __init__(
        self,
        importance_correction: Level,
        importance_clip_min: float = 0.5,
        importance_clip_max: float = 2.0,
        staleness_decay: float = 0.99,
    ) -> None:
        check_choice("algo.importance_correction", importance_correction, ("auto", "none", "token", "sequence"))
        check_number("algo.importance_clip_min", importance_clip_min, at_least=0)
        check_number("algo.staleness_decay", staleness_decay, above=0)
        if importance_clip_max < max(importance_clip_min, 1) or staleness_decay > 1:
            raise InputError(
                f"algo.importance_clip_max={importance_clip_max} must be at least 1 and not below "
                f"algo.importance_clip_min={importance_clip_min}, and algo.staleness_decay={staleness_decay} at most 1"
            )
        self.level, self.staleness_decay = importance_correction, staleness_decay
        self.clip_min, self.clip_max = importance_clip_min, importance_clip_max
        self.exact_engine = True  # whether rows that are not stale were sampled from the policy itself

    def corrected(self, batch: Experience) -> Tensor | None:
        """Rows `[N]` bool that are; None where none can be."""
        if self.level == "none" or (self.level == "auto" and batch.staleness is None):
            return None
        if self.level == "auto" and batch.staleness is not None:
            return (batch.staleness > 0) | (not self.exact_engine)
        return torch.ones(len(batch), dtype=torch.bool, device=batch.response_mask.device)

    def origin(self, logprobs: Tensor, batch: Experience) -> Tensor:
        """Log-probs `[N, T]` of the policy that the weighted rows stand for: `logprobs` if corrected, else pi_old's."""
        rows = self.corrected(batch)
        return batch.old_logprobs if rows is None else torch.where(rows.unsqueeze(1), logprobs, batch.old_logprobs)

    def __call__(self, logprobs: Tensor, batch: Experience) -> tuple[Tensor | None, Cells]:
        """Weights `[N, T]`, or None where nothing is corrected, and metrics of the raw ratios.

        Args:
            logprobs: `[N, T]` of pi_old, or of pi_theta for a loss without a ratio.
            batch: rows with `behavior_logprobs` `[N, T]`, or `[N]` summed over the row, and `staleness` `[N]`.
        """
        corrected = self.corrected(batch)
        if corrected is None:
            return None, {}
        mask, gap, behavior = batch.response_mask, batch.staleness, batch.behavior_logprobs
        now = zero_outside(logprobs.detach(), mask)
        counted = mask & corrected.unsqueeze(1)
        found: dict[str, tuple[Tensor | float, Tensor | None]] = {}
        if behavior.ndim == 2:
            behavior = zero_outside(behavior, mask)
            found["behavior_kl"] = (behavior - now, counted)
        if behavior.ndim == 1 or self.level == "sequence":
            now, behavior = now.sum(1), behavior if behavior.ndim == 1 else behavior.sum(1)
            counted = counted.any(1)
        raw, least = policy_ratio(now, behavior), self._least(batch, now)
        outside = (raw < least) | (raw > self.clip_max)
        found |= {"is_ratio": (raw, counted), "ess": (raw, counted), "clipped_fraction": (outside.float(), counted)}
        weights = importance_weights(now, behavior, least, self.clip_max, self.staleness_decay, gap)
        weights = weights.unsqueeze(1).expand(mask.shape) if weights.ndim == 1 else weights
        weights = torch.where(corrected.unsqueeze(1), weights, 1.0)
        return weights, {f"stability/{name}": cells for name, cells in found.items()}

    def _least(self, batch: Experience, logprobs: Tensor) -> Tensor:
        """The least weight of each row, `[N]` or `[N, 1]`: none where only the engine's arithmetic is corrected."""
        least = logprobs.new_full((len(batch),), self.clip_min)
        if self.level == "auto" and batch.staleness is not None:
            least = torch.where(batch.staleness > 0, least, 0.0)
        return least if logprobs.ndim == 1 else least.unsqueeze(1)

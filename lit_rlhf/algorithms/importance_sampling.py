"""Importance sampling: the off-policy policy gradient on a replay buffer (Signal's document).

    grad J = E_b[ sg( clip(w, 1/c, c) ) A grad log pi_theta(o | q) ],      w = pi_theta(o | q) / pi_b(o | q)
    A      = R - mean R over the batch, or given

pi_b are the weights that sampled a completion, up to `buffer_size` rollouts ago. w is detached: differentiating
w A log pi instead has another gradient, of the wrong sign in the worst case. Per token (the default) it is
biased and steady, per sequence (`importance_correction="sequence"`) exact before the clip, with more variance.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule
from lit_rlhf.errors import InputError, check_number
from lit_rlhf.rollouts.replay import ReplayBuffer
from lit_rlhf.types import PromptBatch, ScoredRollout

_DRAW = 1  # a stream of random numbers apart from that of the minibatches


class ImportanceSampling(OnPolicyModule):
    """The score function on replayed completions, weighed by how likely they are now.

    Choose it when completions are stale or replayed.

    Example:
        module = ImportanceSampling(policy="tiny", buffer_size=8)

    Args:
        clip_ratio: c; weights are clipped to [1/c, c].
        buffer_size: rollouts held; each rollout's groups are drawn from all of them alike.
        min_staleness: draw only groups sampled at least so many rollouts ago, as soon as there are any.
        kl_coef: beta, weight of a KL term, weighed like the samples; Signal's preset has 0.1.
        loss_agg: the average over all tokens of the step is `"token-mean"`.
        importance_clip_min: least weight instead of 1/c.
        importance_clip_max: greatest weight instead of c.
        staleness_decay: factor per rollout between the sampling weights and those trained; by default 1.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "batch_mean"
    policy_loss = "reinforce"
    importance_correction = "token"

    def __init__(
        self,
        *,
        clip_ratio: float = 10.0,
        buffer_size: int = 4,
        min_staleness: int = 0,
        kl_coef: float = 0.0,
        loss_agg: LossAggregation = "token-mean",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        check_number("algo.clip_ratio", clip_ratio, at_least=1)
        check_number("algo.buffer_size", buffer_size, at_least=1)
        if not 0 <= min_staleness < buffer_size:
            raise InputError(f"algo.min_staleness={min_staleness} must be below algo.buffer_size={buffer_size}")
        self.clip_ratio, self.buffer_size, self.min_staleness = clip_ratio, buffer_size, min_staleness
        usual: OnPolicyArgs = {
            "importance_clip_min": 1 / clip_ratio,
            "importance_clip_max": clip_ratio,
            "staleness_decay": 1.0,
        }
        if on_policy.get("importance_correction") != "none":
            on_policy = {**usual, **on_policy}
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)

    @property
    def run_shape(self) -> dict[str, Any]:
        """See `RLHFModule.run_shape`."""
        return {**super().run_shape, "algo.buffer_size": self.buffer_size}

    def gather(self, prompts: PromptBatch) -> ScoredRollout:
        """Put new samples into the buffer and draw as many from it."""
        if self.loop.replay is None:
            self.loop.replay = ReplayBuffer(self.buffer_size, [])
        self.loop.replay.add(self.sample_recorded(prompts))
        seed = (self.seed, self.loop.iteration, self.rank, _DRAW)
        return self.loop.replay.draw(len(prompts), self.min_staleness, *seed).to(self.device)

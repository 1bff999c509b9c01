"""The KL to the reference: in the reward or in the loss, by which estimator, with a fixed or adaptive coefficient."""

from __future__ import annotations

import warnings
from typing import Literal, TypedDict

from torch import Tensor

from lit_rlhf.errors import InputError, check_choice, check_number
from lit_rlhf.functional import adaptive_kl_coef, kl_estimate
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.functional.policy_losses import policy_ratio
from lit_rlhf.functional.shaping import terminal_rewards
from lit_rlhf.models.scoring import Scores
from lit_rlhf.ranks import mean_over_ranks, sum_over_ranks
from lit_rlhf.types import Experience, ScoredRollout

Place = Literal["reward", "loss", "both"]


class KLArgs(TypedDict, total=False):
    """The keyword arguments of `KLPenalty`."""

    kl_estimator: str | None
    kl_unbiased: bool
    kl_target: float | None
    kl_horizon: int


class KLPenalty:
    """The arguments `kl_*` of the on-policy algorithms.

    In the reward, the only place where the policy gradient is that of the whole sequence's KL, the estimator is k1
    of the policy that sampled, without gradient; in the loss k3 of the policy now. In the loss k1 has no expected
    gradient, k2 and `"full"` that of KL(pi, ref), k3 that of KL(ref, pi), and `kl_unbiased` (rho k3, DeepSeek-V3.2)
    that of KL(pi, ref) again.

    Args:
        kl_coef: beta, to begin with.
        kl_in: `"reward"`, `"loss"` or `"both"`.
        kl_estimator: `"k1"`, `"k2"`, `"k3"`, or, in the loss, `"full"`, the sum over the vocabulary. None: k1 in the
            reward, k3 in the loss.
        kl_unbiased: multiply the loss's estimate by the ratio of the policy to pi_old, with its gradient.
        kl_target: KL wanted, in nats per completion; beta is moved towards it (Ziegler). None: it is fixed.
        kl_horizon: completions over which beta adapts.
    """

    def __init__(
        self,
        kl_coef: float,
        kl_in: Place,
        kl_estimator: str | None = None,
        kl_unbiased: bool = False,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
    ) -> None:
        check_number("algo.kl_coef", kl_coef, at_least=0)
        check_choice("algo.kl_in", kl_in, ("reward", "loss", "both"))
        check_choice("algo.kl_estimator", kl_estimator or "k1", ("k1", "k2", "k3", "full"))
        check_number("algo.kl_target", 1.0 if kl_target is None else kl_target, above=0)
        check_number("algo.kl_horizon", kl_horizon, above=0)
        if kl_estimator == "full" and kl_in != "loss":
            raise InputError("algo.kl_estimator=full has no gradient in the reward; write algo.kl_in=loss, or use k1")
        if kl_target is not None and not kl_coef:
            raise InputError("algo.kl_target moves algo.kl_coef, which is 0; begin with algo.kl_coef=0.1, say")
        if kl_coef and kl_in != "reward" and kl_estimator == "k1" and not kl_unbiased:
            warnings.warn("algo.kl_estimator=k1 as a loss has zero expected gradient; use k2 or k3", stacklevel=4)
        self.target, self.horizon, self.unbiased = kl_target, kl_horizon, kl_unbiased
        self.in_reward = kl_coef > 0 and kl_in in ("reward", "both")
        self.in_loss = kl_coef > 0 and kl_in in ("loss", "both")
        self.reward_estimator = kl_estimator if kl_estimator and kl_in == "reward" else "k1"
        self.loss_estimator = kl_estimator if kl_estimator and kl_in != "reward" else "k3"

    @property
    def exact(self) -> bool:
        """Whether the loss needs the reference's whole distribution."""
        return self.in_loss and self.loss_estimator == "full"

    def shape(self, rewards: Tensor, rollout: ScoredRollout, coef: float) -> Tensor:
        """Rewards `[N, T]`: those given per token, or the score `[N]` on the last one, minus beta KL on every one."""
        assert rollout.ref_logprobs is not None
        kl = kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, self.reward_estimator)
        per_token = terminal_rewards(rewards, rollout.response_mask) if rewards.ndim == 1 else rewards
        return per_token - coef * kl

    def per_token(self, scores: Scores, batch: Experience, weights: Tensor | None, origin: Tensor) -> Tensor:
        """The loss's KL `[N, T]`, with gradient.

        Args:
            scores: of the policy now.
            batch: rows with `ref_logprobs`.
            weights: `[N, T]` importance weights of the samples, which weigh their estimates too.
            origin: `[N, T]` log-probs of the policy that the weighted samples stand for, from which an unbiased
                estimate goes on to the policy now.
        """
        if self.exact:
            assert scores.kl is not None
            return scores.kl
        assert batch.ref_logprobs is not None
        kl = kl_estimate(scores.logprobs, batch.ref_logprobs, self.loss_estimator)
        if self.unbiased:
            kl = policy_ratio(scores.logprobs, origin) * kl
        return kl if weights is None else weights * kl

    def next_coef(self, coef: float, rollout: ScoredRollout) -> float:
        """Beta after this rollout, by the mean over all ranks of its completions' KL, summed over their tokens."""
        if self.target is None or rollout.ref_logprobs is None:
            return coef
        kl = zero_outside(rollout.old_logprobs - rollout.ref_logprobs, rollout.response_mask).sum(1)
        counted = rollout.response_mask.any(1)
        mean, episodes = float(mean_over_ranks(kl, counted)), int(sum_over_ranks(counted.sum()))
        return adaptive_kl_coef(coef, mean, self.target, self.horizon, episodes)

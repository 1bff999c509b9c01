"""The KL to the reference: in the reward or in the loss, by which estimator, with a fixed or adaptive coefficient."""

from __future__ import annotations

import warnings
from typing import Literal

from torch import Tensor

from lit_rlhf.errors import InputError, check_choice, check_number
from lit_rlhf.functional import adaptive_kl_coef, kl_estimate
from lit_rlhf.functional.policy_losses import policy_ratio
from lit_rlhf.functional.shaping import terminal_rewards
from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import Experience, ScoredRollout

Place = Literal["reward", "loss", "both"]


class KLPenalty:
    """What the arguments `kl_*` of `OnPolicyModule` mean.

    In the reward, the only place where the policy gradient is that of the whole sequence's KL, the estimator is k1
    of the policy that sampled, without gradient; in the loss k3 of the policy now. In the loss k1 has no expected
    gradient, k2 and `"full"` that of KL(pi, ref), k3 that of KL(ref, pi), and `unbiased` (rho k3, DeepSeek-V3.2)
    that of KL(pi, ref) again.

    Args:
        coef: beta, to begin with.
        place: `"reward"`, `"loss"` or `"both"`.
        estimator: `"k1"`, `"k2"`, `"k3"`, or, in the loss, `"full"`, the sum over the vocabulary. None: as above.
        unbiased: multiply by the ratio of the policy to pi_old, with its gradient.
        target: KL wanted, in nats per completion; the coefficient is moved towards it (Ziegler). None: it is fixed.
        horizon: completions over which it adapts.
    """

    def __init__(
        self,
        coef: float,
        place: Place,
        estimator: str | None,
        unbiased: bool,
        target: float | None,
        horizon: int,
    ) -> None:
        check_number("algo.kl_coef", coef, at_least=0)
        check_choice("algo.kl_in", place, ("reward", "loss", "both"))
        check_choice("algo.kl_estimator", estimator or "k1", ("k1", "k2", "k3", "full"))
        check_number("algo.kl_target", 1.0 if target is None else target, above=0)
        check_number("algo.kl_horizon", horizon, above=0)
        if estimator == "full" and place != "loss":
            raise InputError("algo.kl_estimator=full has no gradient in the reward; write algo.kl_in=loss, or use k1")
        if target is not None and not coef:
            raise InputError("algo.kl_target moves algo.kl_coef, which is 0; give algo.kl_coef=0.1, say, to begin with")
        if coef and place != "reward" and estimator == "k1" and not unbiased:
            warnings.warn("algo.kl_estimator=k1 as a loss has zero expected gradient; use k2 or k3", stacklevel=4)
        self.coef, self.target, self.horizon, self.unbiased = coef, target, horizon, unbiased
        self.in_reward = coef > 0 and place in ("reward", "both")
        self.in_loss = coef > 0 and place in ("loss", "both")
        self.reward_estimator = estimator if estimator and place == "reward" else "k1"
        self.loss_estimator = estimator if estimator and place != "reward" else "k3"

    @property
    def exact(self) -> bool:
        """Whether the loss needs the reference's whole distribution."""
        return self.in_loss and self.loss_estimator == "full"

    def shape(self, rewards: Tensor, rollout: ScoredRollout, coef: float) -> Tensor:
        """Rewards `[N, T]`: the score `[N]` on the last token, minus beta KL on every one."""
        assert rollout.ref_logprobs is not None
        kl = kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, self.reward_estimator)
        return terminal_rewards(rewards, rollout.response_mask) - coef * kl

    def per_token(self, scores: Scores, batch: Experience, weights: Tensor | None) -> Tensor:
        """The loss's KL `[N, T]`, with gradient; estimates from stale samples are weighted as the samples are."""
        if scores.kl is not None:
            return scores.kl
        assert batch.ref_logprobs is not None
        kl = kl_estimate(scores.logprobs, batch.ref_logprobs, self.loss_estimator)
        if self.unbiased:
            kl = policy_ratio(scores.logprobs, batch.old_logprobs) * kl
        return kl if weights is None else weights * kl

    def next_coef(self, coef: float, kl: float, episodes: int) -> float:
        """Beta after a rollout of that many completions whose KL, summed over tokens, was `kl` in the mean."""
        return coef if self.target is None else adaptive_kl_coef(coef, kl, self.target, self.horizon, episodes)

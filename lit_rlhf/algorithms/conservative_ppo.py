"""Conservative PPO: PPO with a penalty above a KL threshold (Signal's document; the coefficient as in PPO, section 4).

    L = L_pg + c_v L_v - c_e H + c max(0, K - kappa)^2,        K = mean_t KL( pi_theta(. | o_<t) || pi_ref(. | o_<t) )

K is over all tokens of the optimiser step, summed over the vocabulary or estimated by k2. The penalty is no sum over
micro-batches and ranks: each adds 2c max(0, K - kappa) k_t / M, its exact gradient, with K taken before the step. The
document's k1 has none in expectation. `adaptive` doubles c where K > 1.5 kappa and halves it where K < kappa / 1.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule
from lit_rlhf.errors import check_choice, check_number
from lit_rlhf.functional import doubling_coef, kl_estimate
from lit_rlhf.models.scoring import Scores
from lit_rlhf.ranks import mean_over_ranks
from lit_rlhf.types import Experience


class ConservativePPO(OnPolicyModule):
    """PPO that is held near the reference by a quadratic penalty above a KL threshold.

    Choose it when the policy must stay near the reference.

    Example:
        module = ConservativePPO(policy="tiny", max_kl_divergence=0.02, adaptive=True)

    Args:
        conservative_coef: c, to begin with.
        max_kl_divergence: kappa, nats per token.
        adaptive: move c, within `conservative_coef_range`.
        conservative_coef_range: least and greatest c.
        penalty_kl: `"full"`, over the vocabulary, or `"k2"`, from the sampled tokens.
        gamma: discount per token.
        gae_lambda: lambda of GAE; 0 trusts the value function, 1 the returns.
        clip_ratio_low: eps below 1.
        clip_ratio_high: eps above 1.
        kl_coef: beta of a further KL term, in the reward unless `kl_in="loss"`.
        loss_agg: the average over all tokens of the step is `"token-mean"`.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "gae"
    policy_loss = "clip"
    value = "separate"
    kl_in = "reward"
    whiten_advantages = True
    update_epochs = 4
    needs_reference = True
    hyper_parameters = ("gamma", "gae_lambda", "clip_ratio_low", "clip_ratio_high")
    stats_spec: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **OnPolicyModule.stats_spec,
        **{f"stability/{name}": ("value",) for name in ("kl_violation", "max_kl_threshold", "conservative_coef")},
        "loss/kl_penalty": ("value",),
    }

    def __init__(
        self,
        *,
        conservative_coef: float = 0.1,
        max_kl_divergence: float = 0.01,
        adaptive: bool = False,
        conservative_coef_range: tuple[float, float] = (1e-3, 1e3),
        penalty_kl: Literal["full", "k2"] = "full",
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.2,
        kl_coef: float = 0.0,
        loss_agg: LossAggregation = "token-mean",
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        check_choice("algo.penalty_kl", penalty_kl, ("full", "k2"))
        check_number("algo.conservative_coef", conservative_coef, at_least=0)
        check_number("algo.max_kl_divergence", max_kl_divergence, above=0)
        check_number("algo.conservative_coef_range[1]", conservative_coef_range[1], at_least=conservative_coef_range[0])
        self.conservative_coef, self.max_kl_divergence, self.adaptive = conservative_coef, max_kl_divergence, adaptive
        self.conservative_coef_range, self.needs_exact_kl = conservative_coef_range, penalty_kl == "full"
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip_ratio_low, self.clip_ratio_high = clip_ratio_low, clip_ratio_high
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)
        self._step_kl: Tensor | None = None  # K, where several micro-batches make the optimiser step

    @property
    def current_coef(self) -> float:
        """The penalty's coefficient now."""
        return self.loop.numbers.get("conservative_coef", self.conservative_coef)

    def _kl(self, scores: Scores, batch: Experience) -> Tensor:
        if self.needs_exact_kl and scores.kl is not None:
            return scores.kl
        assert batch.ref_logprobs is not None
        return kl_estimate(scores.logprobs, batch.ref_logprobs, "k2")

    @torch.no_grad()
    def begin_step(self, batches: Sequence[Experience]) -> None:
        """Where several micro-batches make the step, K needs a forward pass of its own over all of them."""
        self._step_kl = None
        if len(batches) > 1 and "stopped" not in self.loop.numbers:
            with self._precision():
                kl = torch.cat([self._kl(self.score(batch), batch)[batch.response_mask] for batch in batches])
            self._step_kl = mean_over_ranks(kl, torch.ones_like(kl, dtype=torch.bool))

    def compute_loss(self, scores: Scores, batch: Experience) -> dict[str, Tensor]:
        """PPO's terms and the penalty: its value, and its gradient through this micro-batch's share of K."""
        kl, K = self._kl(scores, batch), self._step_kl
        if K is None or batch.step_tokens is None:
            K = mean_over_ranks(kl.detach(), batch.response_mask)
        kappa, c = self.max_kl_divergence, self.current_coef
        share = self.aggregate(kl, batch)
        excess = (K - kappa).clamp(min=0).to(kl)
        penalty = c * excess.square() / (self.loss_scale * self.parts.count) + 2 * c * excess * (share - share.detach())
        self._last_kl = float(K)
        own = {"kl_violation": float(excess > 0), "max_kl_threshold": kappa, "conservative_coef": c}
        self.count({f"stability/{name}": (value, None) for name, value in own.items()})
        return {**super().compute_loss(scores, batch), "kl_penalty": penalty}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Adapt c, once per step that is taken."""
        super().on_before_optimizer_step(optimizer)
        if self.adaptive and "stopped" not in self.loop.numbers:
            found = (self.current_coef, self._last_kl, self.max_kl_divergence)
            self.loop.numbers["conservative_coef"] = doubling_coef(*found, *self.conservative_coef_range)

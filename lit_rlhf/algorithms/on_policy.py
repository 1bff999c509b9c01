"""The on-policy family: sample, score, estimate advantages, update; the template and its three hooks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation, ModuleArgs, RLHFModule
from lit_rlhf.algorithms.on_policy_checks import check_arguments, check_loop
from lit_rlhf.algorithms.on_policy_stats import ON_POLICY_STATS, rollout_stats, sample_stats, update_stats
from lit_rlhf.functional import kl_estimate
from lit_rlhf.models.scoring import Scores
from lit_rlhf.registry import call_with_named, get_adv_estimator, get_policy_loss
from lit_rlhf.rollouts.loader import PromptStream, RolloutLoader, permutation
from lit_rlhf.types import Experience, PromptBatch, Row, ScoredRollout

_PROPORTIONAL_LOSSES = ("clip", "gspo", "cispo")  # 0 where the advantage is 0
_SCALAR_LOSS = (
    "the policy loss returns a scalar, which is used as it is: with micro-batches or ranks of unequal lengths their "
    "tokens weigh differently; return [N, T] and algo.loss_agg averages them exactly"
)


class OnPolicyArgs(ModuleArgs, total=False):
    """The keyword arguments of `OnPolicyModule`, which every on-policy algorithm passes on."""

    lr: float | None
    group_size: int
    prompts_per_rollout: int
    minibatches: int
    update_epochs: int
    advantage_estimator: str | Callable[..., Any] | None
    policy_loss: str | Callable[..., Any] | None
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    mask_truncated: bool
    skip_zero_advantage: bool


class OnPolicyModule(RLHFModule):
    """Template of the on-policy algorithms. One fit epoch is one rollout.

    A subclass names its `advantage_estimator` and `policy_loss` and overrides the hooks it changes:
    `shape_rewards`, `compute_advantages`, `compute_loss`.

    Args:
        lr: AdamW's peak learning rate; by default `recommended_lr` of the policy's size.
        group_size: G, completions sampled per prompt.
        prompts_per_rollout: prompts of one rollout, over all ranks.
        minibatches: optimiser steps per pass over a rollout.
        update_epochs: passes over a rollout.
        advantage_estimator: a registered name or a function `(rewards, mask, **named) -> (advantages, returns)`.
        policy_loss: a registered name or a function `(old_logp, logp, advantages, mask, **named) -> (loss, metrics)`.
        loss_agg: how per-token losses are averaged, see `functional.aggregate`.
        kl_coef: weight of the KL to the reference in the loss. With 0 no reference model is held.
        kl_estimator: `"k1"`, `"k2"` or `"k3"`, see `functional.kl_estimate`.
        entropy_coef: weight of the entropy bonus.
        mask_truncated: leave completions that were cut off at `max_new_tokens` out of the loss; their rewards
            still count in the group.
        skip_zero_advantage: leave completions of advantage 0, those of groups with equal rewards, out of the
            forward and backward pass. The gradient is the same, since the built-in losses are proportional to the
            advantage; the `stability/` metrics then describe the completions that remain. Without effect beside a
            KL or entropy term or a loss of your own, which may act on all.
        **module: the arguments of `RLHFModule`.
    """

    advantage_estimator: Any = "group_normalize"
    policy_loss: Any = "clip"
    hyper_parameters: ClassVar[tuple[str, ...]] = ()  # the subclass's own, offered by name to estimator and loss
    progress_keys = ("reward/reward_mean", "reward/accuracy", "stability/entropy")
    stats_spec: ClassVar[Mapping[str, tuple[str, ...]]] = ON_POLICY_STATS

    def __init__(
        self,
        *,
        lr: float | None = None,
        group_size: int = 8,
        prompts_per_rollout: int = 32,
        minibatches: int = 1,
        update_epochs: int = 1,
        advantage_estimator: str | Callable[..., Any] | None = None,
        policy_loss: str | Callable[..., Any] | None = None,
        loss_agg: LossAggregation = "token-mean",
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
        mask_truncated: bool = False,
        skip_zero_advantage: bool = False,
        **module: Unpack[ModuleArgs],
    ) -> None:
        super().__init__(**module, lr=lr, reference=kl_coef != 0)
        self.advantage_estimator = advantage_estimator or type(self).advantage_estimator
        self.policy_loss = policy_loss or type(self).policy_loss
        self._estimate, self._policy_loss = (
            get_adv_estimator(self.advantage_estimator),
            get_policy_loss(self.policy_loss),
        )
        self.group_size, self.prompts_per_rollout = group_size, prompts_per_rollout
        self.minibatches, self.update_epochs = minibatches, update_epochs
        self.loss_agg, self.kl_coef, self.kl_estimator = loss_agg, kl_coef, kl_estimator
        self.entropy_coef, self.mask_truncated = entropy_coef, mask_truncated
        self.skip_zero_advantage = skip_zero_advantage and self._proportional_to_advantages
        self.sampling = replace(self.sampling, group_size=group_size)
        check_arguments(self)
        self.prompts: PromptStream | None = None
        self.clock = {"rollout": 0.0, "update": 0.0, "tokens": 0.0}

    @property
    def _proportional_to_advantages(self) -> bool:
        """Whether the whole loss is known to be: no KL or entropy term, a built-in loss, the template's terms."""
        template = type(self).compute_loss is OnPolicyModule.compute_loss
        return template and self.policy_loss in _PROPORTIONAL_LOSSES and not (self.kl_coef or self.entropy_coef)

    # -- the rollout: collect and its hooks -------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, prompts: PromptBatch) -> Experience:
        """Sample the prompts, score, shape and weigh the completions: all that the updates need.

        Args:
            prompts: B prompts of this rank.

        Returns:
            N = B * group_size rows with `old_logprobs`, `ref_logprobs` (if there is a reference), `rewards`
            and `advantages`. Called by the loader, without gradients.
        """
        started = time.perf_counter()
        with self._precision():
            rollout = self.score_rollout(self.gather(prompts))
        rollout = replace(rollout, rewards=self.shape_rewards(rollout))
        advantages, returns = self.compute_advantages(rollout)
        mask = rollout.response_mask & ~(rollout.truncated.unsqueeze(1) & self.mask_truncated)
        kept = {f.name: getattr(rollout, f.name) for f in fields(rollout)} | {"response_mask": mask}
        self.stats.update(rollout_stats(rollout, self.loop.iteration))
        self.clock["rollout"] += time.perf_counter() - started
        return Experience(**kept, advantages=advantages, returns=returns)

    def gather(self, prompts: PromptBatch) -> ScoredRollout:
        """The samples of one rollout: those of `prompts`. Dynamic sampling replaces some of them."""
        return self.sample_recorded(prompts)

    def sample_recorded(self, prompts: PromptBatch) -> ScoredRollout:
        """`sample`, counted in the rollout's metrics."""
        sampled = self.sample(prompts)
        self.stats.update(sample_stats(sampled, self.accuracy(sampled)))
        self.clock["tokens"] += float(sampled.lengths.sum())
        return sampled

    def score_rollout(self, rollout: ScoredRollout) -> ScoredRollout:
        """Add the log-probs at the start of the update phase, and the reference's.

        The sampler's own log-probs are those of the policy where the weights are the same, the distribution is
        not cut off by top-p or top-k, and both compute in float32. Otherwise the policy scores the rows again.
        Rows that dynamic sampling carried over then keep the log-probs they were sampled with, so that the ratio
        corrects for their age.
        """
        temperature, old, ref = self.sampling.temperature, rollout.old_logprobs, None
        if self.sampling.truncates_distribution or not self._full_precision:
            old = self.models.score(rollout, temperature=temperature).logprobs
        if self.models.reference is not None:
            ref = self.models.score_reference(rollout, temperature=temperature).logprobs
        return replace(rollout, old_logprobs=old, ref_logprobs=ref)

    def _precision(self) -> AbstractContextManager[Any]:
        """The trainer's autocast: rollouts run outside the steps that Lightning wraps in it."""
        return self._trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    @property
    def _full_precision(self) -> bool:
        weights = next(self.models.policy.parameters()).dtype in (torch.float32, torch.float64)
        return weights and (self._trainer is None or self._trainer.precision in ("32-true", "64-true"))

    def shape_rewards(self, rollout: ScoredRollout) -> Tensor:
        """Hook 1: rewards `[N]` or `[N, T]` from the raw `rollout.rewards` `[N]`."""
        return rollout.rewards

    def compute_advantages(self, rollout: ScoredRollout) -> tuple[Tensor, Tensor | None]:
        """Hook 2: advantages `[N, T]` and returns `[N, T]` or None. Calls `advantage_estimator`.

        An estimator may return one number per row, `[N]`: it goes to each of the row's tokens.
        """
        named = {n: getattr(rollout, n) for n in ("values", "old_logprobs", "ref_logprobs", "group_ids")}
        advantages, returns = call_with_named(
            self._estimate, rollout.rewards, rollout.response_mask, **named, bootstrap=None, **self._named()
        )
        if advantages.ndim == 1:
            advantages = rollout.spread(advantages)
        if returns is not None and returns.ndim == 1:
            returns = rollout.spread(returns)
        return advantages, returns

    def _named(self) -> dict[str, Any]:
        """The module's own hyper-parameters, offered by name to the estimator and the loss."""
        return {name: getattr(self, name) for name in self.hyper_parameters}

    # -- the update ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Experience, batch_idx: int = 0) -> Tensor:
        """One micro-batch's loss, a plain function of the experience; scaled so that any split is exact."""
        started = time.perf_counter()
        scores = self.models.score(batch, temperature=self.sampling.temperature, entropy=True)
        loss = self.total_loss(self.compute_loss(scores, batch))
        self.stats.update(update_stats(scores, batch))
        self.clock["update"] -= started
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the update's time, backward and optimiser included."""
        self.clock["update"] += time.perf_counter()

    def compute_loss(self, scores: Scores, batch: Experience) -> dict[str, Tensor]:
        """Hook 3: the named terms of the loss, scalars. Calls `policy_loss`, adds KL and entropy terms."""
        per_token, metrics = call_with_named(
            self._policy_loss,
            batch.old_logprobs,
            scores.logprobs,
            batch.advantages,
            batch.response_mask,
            **self._named(),
        )
        if per_token.ndim == 0:
            warnings.warn(_SCALAR_LOSS, stacklevel=2)  # Python shows it once
            terms = {"policy_loss": per_token / self.loss_scale}
        else:
            terms = {"policy_loss": self.aggregate(per_token, batch, self.loss_agg)}
        if batch.ref_logprobs is not None and self.kl_coef:
            kl = kl_estimate(scores.logprobs, batch.ref_logprobs, self.kl_estimator)
            terms["kl_loss"] = self.kl_coef * self.aggregate(kl, batch, self.loss_agg)
        if self.entropy_coef and scores.entropy is not None:
            terms["entropy_loss"] = -self.entropy_coef * self.aggregate(scores.entropy, batch)
        known = {
            f"stability/{k}": torch.as_tensor(v) for k, v in metrics.items() if f"stability/{k}" in self.stats_spec
        }
        mask = batch.response_mask  # a user's loss may report a scalar, or a number per row
        self.stats.update({name: (v, mask if v.shape == mask.shape else None) for name, v in known.items()})
        return terms

    # -- metrics ---------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Log the rollout's metrics, with the time it took."""
        seconds = self.clock["rollout"] + self.clock["update"]
        self.publish(
            self.stats,
            {
                "rollout/iteration": float(self.loop.iteration),
                "perf/rollout_seconds": self.clock["rollout"],
                "perf/update_seconds": self.clock["update"],
                "perf/tokens_per_second": self.clock["tokens"] / max(seconds, 1e-9),
            },
        )
        self.clock = dict.fromkeys(self.clock, 0.0)

    # -- data ----------------------------------------------------------------------------------------------------

    @property
    def prompts_per_rank(self) -> int:
        """Prompts that this rank samples for one rollout."""
        return self.prompts_per_rollout // self.world_size

    @property
    def micro_batches_per_rollout(self) -> int:
        """Length of the training loader: passes x optimiser steps x micro-batches."""
        return self.update_epochs * self.minibatches * self.accumulate

    @property
    def run_shape(self) -> dict[str, Any]:
        """See `RLHFModule.run_shape`."""
        sizes = ("prompts_per_rollout", "group_size", "minibatches", "update_epochs")
        return {**super().run_shape, **{f"algo.{name}": getattr(self, name) for name in sizes}}

    def draw_prompts(self, count: int) -> PromptBatch:
        """Take the next `count` prompts per rank from the stream."""
        assert self.prompts is not None
        start = self.loop.prompts_seen
        self.loop.prompts_seen += count * self.world_size
        return self.prompts.take(start + self.rank * count, count)

    def minibatch_plan(self) -> list[Tensor]:
        """The rows of every micro-batch of this rollout; each pass has an order of its own."""
        rows = self.prompts_per_rank * self.group_size
        passes = [permutation(rows, self.seed, self.loop.iteration, epoch) for epoch in range(self.update_epochs)]
        return [chunk for order in passes for chunk in order.chunk(self.minibatches * self.accumulate)]

    def training_loader(self, rows_of: Callable[[int], Sequence[Row]]) -> RolloutLoader:
        """The lazy view of the rollouts. The prompts are those of pass 0 over the data, shuffled for ever."""
        check_loop(self)
        self.prompts = PromptStream(rows_of(0), self.encode_prompt, self.seed)
        return RolloutLoader(self)

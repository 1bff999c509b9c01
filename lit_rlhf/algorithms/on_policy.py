"""The on-policy family: sample, score, estimate advantages, update; the template and its three hooks."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from lightning.pytorch import Callback
from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation, RLHFModule
from lit_rlhf.algorithms.critic import Critic, CriticArgs
from lit_rlhf.algorithms.given import read_completions, score_given, with_given
from lit_rlhf.algorithms.kl_penalty import KLArgs, KLPenalty, Place
from lit_rlhf.algorithms.on_policy_args import OnPolicyArgs as OnPolicyArgs
from lit_rlhf.algorithms.on_policy_args import TemplateArgs
from lit_rlhf.algorithms.on_policy_checks import (
    check_arguments,
    check_loop,
    check_scalar,
    checked_advantages,
    checked_loss,
    per_token,
    warn_of_idle,
)
from lit_rlhf.algorithms.on_policy_stats import (
    ON_POLICY_STATS,
    RATIO_BINS,
    count_rewards,
    explained,
    loss_stats,
    mismatch_stats,
    rollout_stats,
    sample_stats,
    tell,
    update_stats,
    warn_of_no_rewards,
    with_length_correlation,
)
from lit_rlhf.algorithms.proximal import is_found_in_update, not_scored_yet, to_score_again, with_found
from lit_rlhf.algorithms.reward_scaling import RewardArgs, RewardScaling
from lit_rlhf.algorithms.target_kl import TargetKL
from lit_rlhf.errors import check_choice
from lit_rlhf.functional.shaping import add_scores
from lit_rlhf.metrics import Histogram
from lit_rlhf.models.parallel import local
from lit_rlhf.models.scoring import Scores
from lit_rlhf.models.wrapper import ValueKind
from lit_rlhf.monitoring.healthy import Healthy
from lit_rlhf.ranks import whiten_over_ranks
from lit_rlhf.registry import call_with_named, get_adv_estimator, get_policy_loss, has_ratio
from lit_rlhf.rollouts.ahead import EndsWithFit, RolloutsAhead
from lit_rlhf.rollouts.curriculum import CurriculumArgs, SuccessCurriculum
from lit_rlhf.rollouts.engines import has_exact_logprobs
from lit_rlhf.rollouts.importance import ImportanceArgs, ImportanceCorrection, Level
from lit_rlhf.rollouts.loader import PromptStream, RolloutLoader
from lit_rlhf.rollouts.sampler import scored, start_of_update
from lit_rlhf.types import Experience, PromptBatch, Row, SamplingConfig, ScoredRollout

# 0 where the advantage is 0
_PROPORTIONAL_LOSSES = ("clip", "gspo", "gspo_token", "cispo", "sequence_clip", "reinforce")
_OF_THE_PAPER = (
    *("minibatches", "update_epochs", "advantage_estimator", "policy_loss", "kl_in", "whiten_advantages", "value"),
    "importance_correction",
)
_PARTS = tuple(part.__annotations__ for part in (KLArgs, CriticArgs, ImportanceArgs, RewardArgs, CurriculumArgs))


class OnPolicyModule(RLHFModule):
    """Template of the on-policy algorithms. One fit epoch is one rollout.

    A subclass states as class attributes what its paper says: `advantage_estimator`, `policy_loss`, `kl_in`, `value`,
    `whiten_advantages`, `importance_correction`, `minibatches`, `update_epochs`. Arguments of the same name replace
    them; what else is an argument takes its default from a constructor. It overrides the hooks it changes:
    `shape_rewards`, `compute_advantages`, `compute_loss`.

    Args:
        lr: AdamW's peak learning rate; by default `recommended_lr` of the policy's size.
        group_size: G, completions sampled per prompt.
        prompts_per_rollout: prompts of one rollout, over all ranks.
        minibatches: optimiser steps per pass over a rollout.
        update_epochs: passes over a rollout.
        advantage_estimator: a registered name, an import path or a function
            `(rewards, mask, **named) -> (advantages, returns)`.
        policy_loss: the same for `(old_logp, logp, advantages, mask, **named) -> (loss, metrics)`.
        loss_agg: how per-token losses are averaged, see `functional.aggregate`.
        kl_coef: beta, weight of the KL to the reference. With 0 no reference model is held.
        kl_in: `"reward"`, `"loss"` or `"both"`; see `KLPenalty`.
        whiten_advantages: to mean 0 and variance 1 over the rollout's tokens on all ranks; returns stay as they are.
        value: the value function: `"none"`, `"shared"` (a head on the policy) or `"separate"` (a model of its own).
        importance_correction: of rows that other weights sampled, see `rollouts.importance`.
        target_kl: nats per token; an optimiser step that begins further than 1.5 times this (k3) from the old policy
            is not taken, and neither are the rollout's remaining ones.
        entropy_coef: c_e, weight of the entropy bonus.
        entropy: `"none"` leaves the metric out, and the memory it takes.
        truncation_penalty: taken from the reward of a completion that was cut off at `max_new_tokens`.
        mask_truncated: leave completions that were cut off out of the loss; their rewards still count in the group.
        skip_zero_advantage: leave completions of advantage 0, those of groups with equal rewards, out of the
            forward and backward pass. The gradient is the same, since the built-in losses are proportional to the
            advantage; the `stability/` metrics then describe the completions that remain. Without effect beside a
            KL, entropy or value term or a loss of your own, which may act on all.
        **parts: the arguments of `RLHFModule`, `KLPenalty`, `Critic`, `ImportanceCorrection`, `RewardScaling` and
            `SuccessCurriculum`.
    """

    argument_parts = (KLPenalty, Critic, ImportanceCorrection, RewardScaling, SuccessCurriculum)
    advantage_estimator: Any = "group_normalize"
    policy_loss: Any = "clip"
    kl_in: Place = "loss"
    value: ValueKind = "none"
    whiten_advantages: bool = False
    importance_correction: Level = "auto"
    minibatches: int = 1
    update_epochs: int = 1
    needs_reference: ClassVar[bool] = False  # also without a KL coefficient
    needs_exact_kl: bool = False  # for a term of the algorithm's own
    hyper_parameters: ClassVar[tuple[str, ...]] = ()  # the subclass's own, offered by name to estimator and loss
    progress_keys = (
        *("reward/reward_mean", "reward/accuracy", "stability/approx_kl", "stability/entropy"),
        "perf/tokens_per_second",
    )
    stats_spec: ClassVar[Mapping[str, tuple[str, ...]]] = ON_POLICY_STATS

    def __init__(
        self,
        *,
        lr: float | None = None,
        group_size: int = 8,
        prompts_per_rollout: int = 32,
        minibatches: int | None = None,
        update_epochs: int | None = None,
        advantage_estimator: str | Callable[..., Any] | None = None,
        policy_loss: str | Callable[..., Any] | None = None,
        loss_agg: LossAggregation = "token-mean",
        kl_coef: float = 0.0,
        kl_in: Place | None = None,
        whiten_advantages: bool | None = None,
        value: ValueKind | None = None,
        importance_correction: Level | None = None,
        target_kl: float | None = None,
        entropy_coef: float = 0.0,
        entropy: Literal["full", "none"] = "full",
        truncation_penalty: float = 0.0,
        mask_truncated: bool = False,
        skip_zero_advantage: bool = False,
        **parts: Unpack[TemplateArgs],
    ) -> None:
        given: dict[str, Any] = dict(parts)
        of_parts = ({k: given.pop(k) for k in part if k in given} for part in _PARTS)
        kl, critic, importance, scaling, curriculum = of_parts
        kind = type(self).value if value is None else value
        check_choice("algo.value", kind, ("none", "shared", "separate"))
        super().__init__(**given, lr=lr, reference=kl_coef != 0 or self.needs_reference, value=kind)
        chosen = (minibatches, update_epochs, advantage_estimator, policy_loss, kl_in, whiten_advantages, value)
        for name, choice in zip(_OF_THE_PAPER, (*chosen, importance_correction), strict=True):
            setattr(self, name, getattr(type(self), name) if choice is None else choice)
        self._estimate = get_adv_estimator(self.advantage_estimator)
        self._policy_loss = get_policy_loss(self.policy_loss)
        self.group_size, self.prompts_per_rollout, self.loss_agg = group_size, prompts_per_rollout, loss_agg
        self.kl_coef, self.kl = kl_coef, KLPenalty(kl_coef, self.kl_in, **kl)
        self.critic = Critic(getattr(self, "clip_ratio_high", 0.2), **critic)
        self.target_kl, self.reward_scaling = TargetKL(target_kl), RewardScaling(**scaling)
        self.importance = ImportanceCorrection(self.importance_correction, **importance)
        self.importance.exact_engine = has_exact_logprobs(self.engine)
        self.curriculum = SuccessCurriculum(**curriculum)
        self.value_lr = self.critic.lr
        self.entropy_coef, self.entropy = entropy_coef, entropy
        self.truncation_penalty, self.mask_truncated = truncation_penalty, mask_truncated
        self.skip_zero_advantage = skip_zero_advantage and self._proportional_to_advantages
        self.sampling = replace(self.sampling, group_size=group_size)
        self.ahead = RolloutsAhead(self.sampling.max_staleness)
        check_arguments(self)
        warn_of_idle(self, {**parts, "kl_in": kl_in})
        self.prompts: PromptStream | None = None
        self.ratios = Histogram(*RATIO_BINS)
        self.clock = {"rollout": 0.0, "wait": 0.0, "update": 0.0, "tokens": 0.0}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse class attributes that would be ignored."""
        super().__init_subclass__(**kwargs)
        arguments = {*get_type_hints(OnPolicyArgs), "kl_coef", "loss_agg"} - set(_OF_THE_PAPER)
        for name in sorted(arguments & vars(cls).keys()):
            raise TypeError(
                f"{cls.__name__}.{name} would have no effect as a class attribute; pass it to the constructor, or give "
                f"{cls.__name__} an __init__ with that default"
            )

    @property
    def healthy(self) -> Healthy:  # type: ignore[override]
        """See `RLHFModule.healthy`. Groups of equal rewards matter where rewards are compared within groups.

        A sequence's ratio is clipped far nearer to 1 than a token's, and far more often (GSPO, section 5.3).
        """
        own: dict[str, Any] = {} if self.compares_within_groups else {"zero_std_fraction": 1.0}
        if self.policy_loss in ("gspo", "gspo_token"):
            own["clip_fraction"] = 0.7
        return Healthy(**own)

    @property
    def compares_within_groups(self) -> bool:
        """Whether the advantages need several samples of a prompt: their estimator asks for the `group_ids`."""
        return "group_ids" in inspect.signature(self._estimate).parameters

    @property
    def _proportional_to_advantages(self) -> bool:
        """Whether the whole loss is known to be: the template's terms, a built-in loss, no KL, entropy or value."""
        template = type(self).compute_loss is OnPolicyModule.compute_loss
        other_terms = self.kl.in_loss or self.entropy_coef or self.value != "none"
        return template and self.policy_loss in _PROPORTIONAL_LOSSES and not other_terms

    # -- the rollout: collect and its hooks -------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, prompts: PromptBatch) -> Experience:
        """Sample the prompts, score, shape and weigh the completions: all that the updates need.

        Args:
            prompts: B prompts of this rank.

        Returns:
            N = B * group_size rows with `old_logprobs`, `ref_logprobs` (if there is a reference), `values` (if there is
            a value function), `rewards`, `advantages` and `returns`. Called by the loader, without gradients.
        """
        started = time.perf_counter()
        self.loop.numbers.pop("stopped", None)
        with self._precision():
            rollout = self.score_rollout(self.gather(prompts))
        warn_of_no_rewards(self, rollout)
        experience = self.experience(rollout)
        self.count(self.curriculum.update(self.loop))
        self.clock["rollout"] += time.perf_counter() - started
        return experience

    def gather(self, prompts: PromptBatch) -> ScoredRollout:
        """Hook: the samples of one rollout, those of `prompts`. Dynamic sampling replaces some of them."""
        return self.sample_recorded(prompts)

    def sample_recorded(self, prompts: PromptBatch) -> ScoredRollout:
        """`sample`, counted in the rollout's metrics."""
        tell(self, prompts)
        sampled = self.sample(prompts)
        right = self.accuracy(sampled)
        self.curriculum.note(prompts, right)
        self.count(sample_stats(sampled, right, self.group_size))
        count_rewards(self, sampled)
        self.clock["tokens"] += float(sampled.lengths.sum())
        return sampled

    def sample(self, prompts: PromptBatch, sampling: SamplingConfig | None = None) -> ScoredRollout:
        """See `RLHFModule.sample`; what was sampled ahead for these prompts is taken instead."""
        found = self.ahead.take(self.loop, prompts) if sampling is None else None
        if found is None:
            return super().sample(prompts, sampling)
        return scored(self.tokenizer, self.rewards, prompts, found.to(self.device), self.group_size)

    def score_rollout(self, rollout: ScoredRollout) -> ScoredRollout:
        """Add the log-probs of policy and reference and the values that the update starts from.

        Where the sampler's own log-probs are not the policy's, see `algorithms.proximal`.
        """
        again, later = to_score_again(self, rollout.version), is_found_in_update(self)
        bootstraps, temperature = self.critic.bootstraps, self.sampling.temperature
        rollout = start_of_update(self.models, rollout, temperature, again & (not later), bootstraps)
        return not_scored_yet(rollout, again) if later and bool(again.any()) else rollout

    def experience(self, rollout: ScoredRollout) -> Experience:
        """Shape the rewards, estimate the advantages, count both; then adapt the KL coefficient.

        Whitened advantages have mean 0 and variance 1 over the tokens that are trained on; a completion that could not
        be scored is not among them, and its advantage is 0.
        """
        coef = self.current_kl_coef
        rollout = self.reward_scaling(rollout, self.loop.numbers)
        rollout = replace(rollout, rewards=self.shape_rewards(rollout))
        found = checked_advantages(self.compute_advantages(rollout))
        advantages, returns = (per_token(x, rollout) for x in found)
        assert advantages is not None
        mask = rollout.response_mask & ~(rollout.truncated.unsqueeze(1) & self.mask_truncated)
        if self.whiten_advantages:
            advantages = whiten_over_ranks(advantages, mask & ~rollout.raw_rewards.isnan().unsqueeze(1))
        kept = {f.name: getattr(rollout, f.name) for f in fields(ScoredRollout)} | {"response_mask": mask}
        staleness = self.loop.iteration - rollout.version
        experience = Experience(**kept, advantages=advantages, returns=returns, staleness=staleness)
        self.count(rollout_stats(experience))
        if self.kl.target is not None:
            self.loop.numbers["kl_coef"] = self.kl.next_coef(coef, rollout)
        if self.kl_coef:  # the loss takes it as it has just adapted, the reward as it was
            self.count({"stability/kl_coef": (coef if self.kl.in_reward else self.current_kl_coef, None)})
        return experience

    def _precision(self) -> AbstractContextManager[Any]:
        """The trainer's autocast: rollouts run outside the steps that Lightning wraps in it."""
        return self._trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    @property
    def _full_precision(self) -> bool:
        weights = next(self.models.policy.parameters()).dtype in (torch.float32, torch.float64)
        exact = self.device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"  # and not TF32
        return weights and exact and (self._trainer is None or self._trainer.precision in ("32-true", "64-true"))

    @property
    def current_kl_coef(self) -> float:
        """Beta now: `kl_coef`, until it has adapted."""
        return self.loop.numbers.get("kl_coef", self.kl_coef)

    def shape_rewards(self, rollout: ScoredRollout) -> Tensor:
        """Hook 1: rewards `[N]` or `[N, T]` from the raw `rollout.rewards`, `[N]`, or `[N, T]` of a user's own.

        Takes off `truncation_penalty`, then, with `kl_in="reward"`, spreads the KL over the tokens.
        """
        rewards = rollout.rewards
        if self.truncation_penalty:
            rewards = add_scores(rewards, -self.truncation_penalty * rollout.truncated, rollout.response_mask)
        return self.kl.shape(rewards, rollout, self.current_kl_coef) if self.kl.in_reward else rewards

    def compute_advantages(self, rollout: ScoredRollout) -> tuple[Tensor, Tensor | None]:
        """Hook 2: advantages and returns, each `[N, T]`, or `[N]` for each of the row's tokens; returns may be None.

        Calls `advantage_estimator`.
        """
        offered = ("values", "bootstrap", "old_logprobs", "ref_logprobs", "group_ids", "baseline")
        named = {n: getattr(rollout, n) for n in offered}
        found = call_with_named(self._estimate, rollout.rewards, rollout.response_mask, **named, **self._named())
        advantages, returns = (per_token(x, rollout) for x in checked_advantages(found))
        assert advantages is not None
        return advantages, returns

    def _named(self) -> dict[str, Any]:
        """The module's own hyper-parameters, offered by name to the estimator and the loss."""
        return {name: getattr(self, name) for name in self.hyper_parameters}

    # -- the update ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Experience | Mapping[str, Any], batch_idx: int = 0) -> Tensor:
        """One micro-batch's loss, a scalar and plain function of the experience, scaled so that any split is exact.

        Args:
            batch: an experience, or a dictionary in one of the formats of `types.from_dict`.
            batch_idx: Lightning's; not used.
        """
        self.ahead.check()
        self.clock["update"] -= time.perf_counter()
        rows = batch if isinstance(batch, Experience) else self.experience_from(batch)
        if "stopped" in self.loop.numbers:
            return torch.stack([local(p).sum() for p in self.models.parameters() if p.requires_grad]).sum() * 0.0
        return self.parts.loss(self, rows, self._loss)

    def _loss(self, rows: Experience) -> Tensor:
        scores = self.score(rows)
        rows = with_found(rows, scores)
        loss = self.total_loss(self.compute_loss(scores, rows), {"value_loss": self.critic.coef})
        cells = update_stats(scores, rows)
        self.ratios.update(*cells["stability/ratio"])
        self.count(cells if self.importance.exact_engine else {**cells, **mismatch_stats(rows)})
        self.target_kl.add(*cells["stability/approx_kl"])
        return loss

    def score(self, batch: Experience) -> Scores:
        """What `compute_loss` needs of the policy now: log-probs, and entropy, KL and values where they are used."""
        return self.models.score(
            batch,
            temperature=self.sampling.temperature,
            entropy=self.entropy == "full" or bool(self.entropy_coef),
            entropy_gradient=bool(self.entropy_coef),
            exact_kl=self.exact_kl,
            values=self.value != "none",
        )

    @torch.no_grad()
    def experience_from(self, batch: Mapping[str, Any]) -> Experience:
        """The experience that a dictionary of tensors describes, see `types.from_dict`: a rollout by itself.

        Log-probs and values that are not given are those of the models now.

        Raises:
            InputError: a key or its value cannot be used.
        """
        given = read_completions(self, batch)
        self.loop.numbers.pop("stopped", None)
        with self._precision():
            rollout = score_given(self, given)
        self.count(sample_stats(rollout, None, self.group_size))
        return with_given(self.experience(rollout), given)

    @property
    def exact_kl(self) -> bool:
        """Whether `compute_loss` wants `scores.kl`."""
        return self.kl.exact or self.needs_exact_kl

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the update's time, backward and optimiser included."""
        self.clock["update"] += time.perf_counter()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take no step, now and until the next rollout, once the policy has moved beyond `target_kl`."""
        if self.target_kl.exceeded():
            self.loop.numbers["stopped"] = 1.0
        stopped = "stopped" in self.loop.numbers
        if self.target_kl.target is not None:
            self.count({"stability/stopped_fraction": (float(stopped), None)})
        if stopped:
            optimizer.zero_grad(set_to_none=True)  # AdamW leaves parameters without a gradient alone
        else:
            super().on_before_optimizer_step(optimizer)

    def compute_loss(self, scores: Scores, batch: Experience) -> dict[str, Tensor]:
        """Hook 3: the named terms of the loss, scalars. Calls `policy_loss`, adds KL, entropy and value terms."""
        found = call_with_named(
            self._policy_loss,
            batch.old_logprobs,
            scores.logprobs,
            batch.advantages,
            batch.response_mask,
            **self._named(),
        )
        loss, metrics = checked_loss(found, batch.response_mask)
        start = batch.old_logprobs if has_ratio(self._policy_loss) else scores.logprobs.detach()
        weights, cells = self.importance(start, batch)
        own = loss_stats(metrics, batch.response_mask, self.stats_spec)
        self.count({**cells, **own, **self.critic.stats(scores, batch)})
        if loss.ndim == 0:
            check_scalar(self, weights)
            terms = {"policy_loss": loss / self.loss_scale}
        else:
            loss = loss if weights is None else weights * loss
            terms = {"policy_loss": self.aggregate(loss, batch, self.loss_agg)}
        if self.kl.in_loss and (batch.ref_logprobs is not None or scores.kl is not None):
            kl = self.kl.per_token(scores, batch, weights, self.importance.origin(start, batch))
            terms["kl_loss"] = self.current_kl_coef * self.aggregate(kl, batch, self.loss_agg)
        if self.entropy_coef and scores.entropy is not None:
            terms["entropy_loss"] = -self.entropy_coef * self.aggregate(scores.entropy, batch)
        if (error := self.critic.per_token(scores, batch)) is not None:
            terms["value_loss"] = self.critic.coef * self.aggregate(error, batch)
        return terms

    # -- metrics ---------------------------------------------------------------------------------------------------

    def derived(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the explained variance of the value function, and how far the reward goes with the length."""
        return with_length_correlation(explained(values))

    def on_train_epoch_end(self) -> None:
        """Log the rollout's metrics, with the time it took."""
        seconds = self.clock["rollout"] + self.clock["update"]
        found = {
            "rollout/iteration": float(self.loop.iteration),
            "perf/rollout_seconds": self.clock["rollout"],
            "perf/update_seconds": self.clock["update"],
            "perf/tokens_per_second": self.clock["tokens"] / max(seconds, 1e-9),
        }
        if self.ahead.max_staleness:
            found["perf/wait_seconds"] = self.clock["wait"]
        self.publish(self.stats, found)
        self.ratios.reset()
        self.clock = dict.fromkeys(self.clock, 0.0)

    # -- data ----------------------------------------------------------------------------------------------------

    @property
    def prompts_per_rank(self) -> int:
        """Prompts that this rank samples for one rollout."""
        return self.prompts_per_rollout // self.world_size

    @property
    def run_shape(self) -> dict[str, Any]:
        """See `RLHFModule.run_shape`."""
        sizes = ("prompts_per_rollout", "group_size", "minibatches", "update_epochs")
        of_rollouts = {f"algo.{name}": getattr(self, name) for name in sizes}
        return {**super().run_shape, **of_rollouts, **self.curriculum.run_shape}

    def draw_prompts(self, count: int) -> PromptBatch:
        """Take the next `count` prompts per rank from the stream."""
        assert self.prompts is not None
        start = self.loop.prompts_seen
        self.loop.prompts_seen += count * self.world_size
        return self.prompts.take(start + self.rank * count, count)

    def next_prompts(self) -> PromptBatch:
        """The prompts of the rollout that is due; see `rollouts.ahead`."""
        started = time.perf_counter()
        prompts = self.ahead.next_prompts(self)
        self.clock["wait"] = time.perf_counter() - started
        self.clock["rollout"] += self.clock["wait"]
        return prompts

    def setup(self, stage: str) -> None:
        """See `RLHFModule.setup`; rows that the curriculum cannot be of are refused before anything is sampled."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.curriculum.kind != "none" and self.rewards is not None and hasattr(data, "rows_of"):
            self.curriculum.check(self.rewards, data.rows_of(0))

    def training_loader(self, rows_of: Callable[[int], Sequence[Row]]) -> RolloutLoader:
        """The lazy view of the rollouts, whose prompts are the shuffled rows of pass 0, or the curriculum's."""
        check_loop(self)
        self.ahead.prepare(self)
        self.prompts = self.curriculum.stream(self, rows_of(0))
        self.rewards.check(self.prompts.rows)  # type: ignore[union-attr]
        return RolloutLoader(self)

    def configure_callbacks(self) -> list[Callback]:
        """And what ends the sampler's thread, where rollouts are sampled ahead."""
        return [*super().configure_callbacks(), *([EndsWithFit()] if self.ahead.max_staleness else [])]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `RLHFModule.on_save_checkpoint`; waits for what is sampled ahead."""
        self.ahead.finish(self.loop)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `RLHFModule.on_load_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        own = checkpoint["lit_rlhf"]["ranks"][self.rank]
        self.ratios.counts = own.get("ratios", self.ratios.counts).to(self.device)

    def _counted(self) -> dict[str, Any]:
        return {**super()._counted(), "ratios": self.ratios.counts.clone()}

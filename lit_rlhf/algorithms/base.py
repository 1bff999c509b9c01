"""What every algorithm shares: models, optimiser, loss scaling, metrics, validation, checkpointing."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lit_rlhf.algorithms.documentation import document
from lit_rlhf.algorithms.nonfinite import NonFiniteSteps
from lit_rlhf.algorithms.parts import Parts
from lit_rlhf.algorithms.schedule import DECAY, Schedule, check_betas, check_learning_rate, default_lr, lr_factor
from lit_rlhf.algorithms.validation import VALIDATION_STATS, validation_stats
from lit_rlhf.callbacks.hooks import RLHFCallback
from lit_rlhf.callbacks.lost_ranks import LostRanks
from lit_rlhf.data.encoding import Encoder
from lit_rlhf.errors import InputError, check_choice, check_number
from lit_rlhf.functional import aggregate, aggregation_unit
from lit_rlhf.metrics import Cells, MaskedStats
from lit_rlhf.models.adapters import is_adapted, lora_settings, merged
from lit_rlhf.models.checks import check_generates
from lit_rlhf.models.forward import Shortcuts
from lit_rlhf.models.loading import end_tokens, max_positions, vocabulary_size
from lit_rlhf.models.parallel import whole
from lit_rlhf.models.wrapper import PolicyReferenceValue, ValueKind, tokenizer_for
from lit_rlhf.monitoring.healthy import Healthy
from lit_rlhf.ranks import gather_objects
from lit_rlhf.rewards import DataRewards, Judges, RewardFunctions, reward_functions
from lit_rlhf.rollouts.engines import EngineFactory, RolloutEngine, TransformersEngine
from lit_rlhf.rollouts.loader import PromptLoader, step_counts
from lit_rlhf.rollouts.sampler import TRAINING, engine_for, prompt_seeds, scored
from lit_rlhf.rollouts.state import LoopState, check_optimizer, check_resumable, check_same_model, rewind_to_step
from lit_rlhf.signatures import nearest
from lit_rlhf.strategies import FSDP2Strategy
from lit_rlhf.text import Text
from lit_rlhf.types import CompletionBatch, Experience, PromptBatch, Rollout, Row, SamplingConfig, ScoredRollout

LossAggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
RewardFunction = Callable[..., Any]
NOTHING_AHEAD = "rollout.max_staleness has no effect: {} trains on completions that are given; leave it out"


class ModuleArgs(TypedDict, total=False):
    """The keyword arguments of `RLHFModule`, which every algorithm passes on."""

    policy: nn.Module | str | Path
    tokenizer: Any
    reward_funcs: RewardFunctions | DataRewards | Sequence[RewardFunction | str] | None
    reward_weights: Sequence[float] | None
    sampling: SamplingConfig | Mapping[str, Any] | None
    engine: RolloutEngine | EngineFactory
    lr_schedule: Schedule
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    micro_batch_tokens: int | None
    torch_compile: bool
    max_skipped_steps: int
    validation_samples: int
    seed: int


class RLHFModule(LightningModule):
    """Base of the algorithms.

    Args:
        policy: a Hugging Face causal language model, or the name or path of one; `"tiny"` ships with the package. With
            LoRA adapters (`load_causal_lm(path, lora={"r": 16})`, or your own of peft) only they are trained.
        tokenizer: its tokenizer, or the name or path of one; by default the policy's own.
        reward_funcs: functions in TRL's signature, or their import paths. Without any, the data module's own.
        reward_weights: one weight per function; 1 each by default.
        sampling: how completions are sampled, in training and in validation; a mapping of its arguments will do.
        engine: what samples, or what makes it: `VLLMEngine`, `partial(VLLMServerEngine, urls=[...])`. By default the
            policy itself samples, in process.
        lr: AdamW's peak learning rate; by default `recommended_lr` of the policy's size, or the class's `usual_lr`;
            ten times that where LoRA adapters are trained.
        lr_schedule: after the warm-up, constant, or linear or cosine to 0 at the end of the run.
        warmup_steps: optimiser steps over which the rate rises from 0.
        weight_decay: AdamW's weight decay.
        betas: AdamW's betas.
        micro_batch_tokens: most tokens of a forward and backward pass: a micro-batch of more is taken in several. The
            gradient is the same; what a step has to remember is bounded. Prompts that rows share count once.
        torch_compile: run the forward and backward passes of training through `torch.compile`. It pays in long runs
            whose rows have no prompts to share.
        max_skipped_steps: optimiser steps in a row that are left out because their gradient is not finite, before the
            run ends. The rows of each lie in the run folder's `nonfinite/`.
        validation_samples: completions sampled per held-out prompt in validation.
        seed: decides the order of the data and every sampled token.
        reference: hold a frozen copy of the policy, or, of a policy with adapters, look at it without them.
        value: hold a value function: `"none"`, `"shared"` (a head on the policy) or `"separate"` (a model of its own).
        value_std: standard deviation of the initial weights of its head.
    """

    argument_parts: ClassVar[tuple[type, ...]] = ()  # what else reads the constructor's keywords, for `help()`

    stats_spec: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # logged name -> which of value, mean, std, min, max
    progress_keys: ClassVar[tuple[str, ...]] = ("loss/loss",)  # shown in the progress bar
    learns_from_feedback: ClassVar[bool] = True  # imitation takes other learning rates
    completion_columns: ClassVar[tuple[str, ...]] = ()  # of the data, that it trains on; none where it samples its own
    generates: ClassVar[bool] = True  # its policy is a language model to the end, and no trunk alone
    exports_adapter: ClassVar[bool] = True  # with LoRA: the adapter is all that was learnt
    healthy: Healthy = Healthy()  # what the stability monitor takes for sound
    usual_lr: ClassVar[float | None] = None  # of whole models, where it does not follow from the policy's size

    def __init__(
        self,
        *,
        policy: nn.Module | str | Path = "tiny",
        tokenizer: Any = None,
        reward_funcs: RewardFunctions | DataRewards | Sequence[RewardFunction | str] | None = None,
        reward_weights: Sequence[float] | None = None,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        engine: RolloutEngine | EngineFactory = TransformersEngine,
        lr: float | None = None,
        lr_schedule: Schedule = "constant",
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        micro_batch_tokens: int | None = None,
        torch_compile: bool = False,
        max_skipped_steps: int = 3,
        validation_samples: int = 1,
        seed: int = 0,
        reference: bool = False,
        value: ValueKind = "none",
        value_std: float = 0.0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:  # Python would name this class, and not the one that was asked for
            known = nearest(name, inspect.signature(type(self)).parameters)
            raise TypeError(f"{type(self).__name__} has no argument {name!r}{known}")
        check_number("algo.lr", 1.0 if lr is None else lr, above=0)
        check_number("algo.warmup_steps", warmup_steps, at_least=0)
        check_number("algo.weight_decay", weight_decay, at_least=0)
        check_number("algo.validation_samples", validation_samples, at_least=1)
        check_betas(betas)
        check_choice("algo.lr_schedule", lr_schedule, DECAY)
        self.tokenizer = tokenizer_for(policy, tokenizer)
        self.models = PolicyReferenceValue(policy, reference=reference, value=value, value_std=value_std)
        self.models.shortcuts = Shortcuts(torch_compile=torch_compile)
        if self.generates:
            check_generates(self.models.policy)
        self.lr = lr or default_lr(self.models.policy, self.usual_lr)
        if self.learns_from_feedback:
            check_learning_rate(lr, self.models.policy)
        self.value_lr: float | None = None  # of the value function's own parameters; the policy's where None
        self.lr_schedule, self.warmup_steps = lr_schedule, warmup_steps
        self.weight_decay, self.betas = weight_decay, (betas[0], betas[1])
        self.parts, self.nonfinite = Parts(micro_batch_tokens), NonFiniteSteps(max_skipped_steps)
        self.validation_samples, self.seed = validation_samples, seed
        self.sampling = SamplingConfig(**sampling) if isinstance(sampling, Mapping) else sampling or SamplingConfig()
        if self.sampling.max_staleness and self.completion_columns:
            warnings.warn(NOTHING_AHEAD.format(type(self).__name__), stacklevel=3)
        given = reward_functions(reward_funcs, reward_weights)
        self.rewards = given if isinstance(given, RewardFunctions) else None
        self.reward_timeout = given.timeout  # seconds, of the data module's own, too
        self.judges = Judges(self.rewards)  # and, from `setup` on, the data module's own: validation scores with them
        ours = self.models.policy
        self.encoder = Encoder(self.tokenizer, end_tokens(ours, self.tokenizer), vocabulary_size(ours))
        self.engine = engine_for(ours, self.tokenizer, self.sampling.stop, engine)
        self.loop = LoopState()
        self.validated_at = -1  # global step
        self.stats = MaskedStats(self.stats_spec)
        self._before_step: dict[str, Any] | None = None  # the metrics at the beginning of the optimiser step
        self.validation_stats = MaskedStats(VALIDATION_STATS, samples=self.validation_samples)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Write the docstring and signature of an algorithm, see `algorithms.documentation`."""
        super().__init_subclass__(**kwargs)
        document(cls)

    # -- sampling ------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompt: Text) -> list[int]:
        """Token ids of a prompt to sample from, a text or chat messages; see `Encoder.prompt`."""
        return self.encoder.prompt(prompt, self.prompt_limit)

    @property
    def prompt_limit(self) -> int | None:
        """Most tokens that a prompt to sample from may have; None where the model's configuration does not say."""
        return None if self.row_limit is None else self.row_limit - self.sampling.max_new_tokens

    @property
    def row_limit(self) -> int | None:
        """Most tokens that a prompt and its completion may have; None where the model's configuration does not say."""
        return max_positions(self.models.policy)

    def sample(self, prompts: PromptBatch, sampling: SamplingConfig | None = None) -> ScoredRollout:
        """Sample completions with the current weights and score them with the reward functions.

        Args:
            prompts: B prompts; their stream positions become the group ids and seed their random numbers.
            sampling: by default the module's own; N = B * `sampling.group_size` rows come back.
        """
        sampling = sampling or self.sampling
        rollout = self.generate(prompts, sampling, TRAINING)
        return scored(self.tokenizer, self.rewards, prompts, rollout, sampling.group_size)

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, stage: int) -> Rollout:
        """Sample with the current weights, all of which every rank has for the while."""
        with self.models.gathered():
            self.engine.update_weights(self.models.policy, self.loop.iteration)
            return self.engine.generate(prompts.prompt_ids, sampling, prompt_seeds(prompts, self.seed, stage))

    def accuracy(self, rollout: ScoredRollout) -> Tensor | None:
        """`[N]`, 1 for a right completion and 0 for a wrong one; None if no reward function is a verifier."""
        return self.rewards.accuracy(rollout.reward_parts) if self.rewards is not None else None

    # -- loss scaling (one batch = any micro-batch split = any number of ranks) --------------------------------------

    @property
    def world_size(self) -> int:
        """Number of ranks; 1 outside a trainer."""
        return self._trainer.world_size if self._trainer is not None else 1

    @property
    def rank(self) -> int:
        """This process's rank; 0 outside a trainer."""
        return self._trainer.global_rank if self._trainer is not None else 0

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimiser step; 1 outside a trainer."""
        return self._trainer.accumulate_grad_batches if self._trainer is not None else 1

    @property
    def loss_scale(self) -> int:
        """What Lightning (dividing by the micro-batches) and DDP (averaging over ranks) take away again."""
        return self.accumulate * self.world_size

    def aggregate(
        self, per_token: Tensor, batch: Experience | CompletionBatch, mode: LossAggregation = "token-mean"
    ) -> Tensor:
        """This micro-batch's share of the optimiser step's loss: its sum over the whole step's count.

        Shares add up, over micro-batches and ranks, to `functional.aggregate` of all rows at once.

        Args:
            per_token: `[N, T]`; masked cells may hold anything.
            batch: carries `step_tokens` and `step_rows`. Where they are missing the batch counts as one
                `accumulate`-th of the step.
            mode: see `functional.aggregate`.
        """
        tokens, rows = batch.step_tokens, batch.step_rows
        if tokens is None or rows is None:
            tokens, rows = (n * self.accumulate for n in step_counts([batch.response_mask], self.device))
        unit = tokens if aggregation_unit(mode) == "tokens" else rows
        return aggregate(
            per_token,
            batch.response_mask,
            mode,
            max_length=self.sampling.max_new_tokens,
            denominator=unit.clamp(min=1),  # a step without a single valid token has a loss of 0, not 0/0
        )

    def start_step(self, batches: Sequence[Any]) -> None:
        """Called by the loader with all that an optimiser step scores on this rank, part by part, before it begins."""
        self._before_step = self._counted() if self.accumulate > 1 else None  # else no checkpoint falls within a step
        self.nonfinite.rows = batches
        self.begin_step(batches)

    def begin_step(self, batches: Sequence[Any]) -> None:
        """Hook: what an algorithm has to know of a whole optimiser step."""

    def total_loss(self, terms: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
        """Sum the named terms, record them, and scale the sum for Lightning and DDP.

        Args:
            terms: scalars, each with its coefficient in it.
            weights: coefficients to divide by before a term is logged.
        """
        loss = torch.stack(list(terms.values())).sum()
        logged = {name: term / ((weights or {}).get(name) or 1) for name, term in terms.items()}
        counted = {name: term.detach() * self.loss_scale for name, term in {"loss": loss, **logged}.items()}
        self.count({f"loss/{name}": (term, None) for name, term in self.parts.sum_terms(counted).items()})
        return loss * self.loss_scale

    def configure_callbacks(self) -> list[Callback]:
        """What every run needs, in a notebook too."""
        return [LostRanks()]

    # -- optimisation ----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard the models where the strategy does; Lightning calls this before it asks for the optimiser.

        Raises:
            InputError: a strategy that would shard them in another way, or compiled passes of sharded models.
        """
        strategy = self.trainer.strategy
        zero3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
        if (zero3 or isinstance(strategy, FSDP2Strategy)) and self.models.shortcuts.torch_compile:
            raise InputError("algo.torch_compile is not for sharded models, whose ranks compile apart; leave it out")
        if isinstance(strategy, FSDP2Strategy):
            self.models.shard(strategy.device_mesh)
            self.judges.shard(strategy.device_mesh)  # they have all reward functions
        elif zero3:
            self.models.shard(None)
        elif isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise InputError(
                f"trainer.strategy: {type(strategy).__name__} does not know these models; write trainer=fsdp2 (in "
                "Python strategy=lit_rlhf.strategies.FSDP2Strategy())"
            )

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Lightning calls this between forward and backward, when the first parts have left their gradient."""
        if self.parts.tokens is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters, with warm-up and decay per optimiser step.

        One optimiser with two groups: a second one would double Lightning's `global_step`.
        """
        of_value = self.models.value_parameters
        apart = {id(p) for p in of_value}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.models.parameters() if p.requires_grad and id(p) not in apart]}
        ]
        if of_value:
            groups.append({"params": of_value, "lr": self.value_lr or self.lr})
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=self._fused
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _fused(self) -> bool | None:
        """Whether AdamW's update is one kernel: where the devices have it, and Lightning can clip beside it."""
        mixed = self._trainer is not None and self._trainer.precision.endswith("-mixed")
        return None if mixed or self.device.type not in ("cpu", "cuda") else True

    def _lr_factor(self, step: int) -> float:
        return lr_factor(step, self.lr_schedule, self.warmup_steps, self.total_steps)

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run, by whichever of `max_steps` and `max_epochs` ends it; None when endless."""
        trainer = self._trainer
        if trainer is None or trainer.train_dataloader is None:
            return None
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limits.append(-(-int(trainer.num_training_batches) // self.accumulate) * trainer.max_epochs)
        return min(limits) if limits else None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the gradient's norm, before clipping; take no step where it is not finite."""
        gradients = [p.grad for p in self.models.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        skips = self.nonfinite.skips(self, norm)
        self.count({"stability/skipped_fraction": (float(skips), None)})
        if skips:
            optimizer.zero_grad(set_to_none=True)  # AdamW leaves parameters without a gradient alone
        else:
            self.count({"stability/grad_norm": (norm.detach(), None)})

    # -- metrics and validation --------------------------------------------------------------------------------------

    def count(self, cells: Cells) -> None:
        """Count `{name: (values, mask)}` for the log; of names that `stats_spec` has not, the mean."""
        self.stats.extend(cells)
        self.stats.update(cells)

    def pop_metrics(self) -> dict[str, float]:
        """All that was counted since the last call or log, reduced over the ranks, by the name after the section.

        For training loops of your own: after `training_step(batch)` it holds `policy_loss`, `approx_kl` and so on.
        """
        values = self._reduced(self.stats)
        own_first = sorted(values, key=lambda name: not name.startswith("policy/"))  # ours win where names are the same
        return {name.split("/")[-1]: float(values[name]) for name in own_first}

    def _reduced(self, stats: MaskedStats) -> dict[str, Tensor]:
        """The values over all ranks; then `stats` starts anew."""
        stats.align(list(dict.fromkeys(name for names in gather_objects(list(stats.wanted)) for name in names)))
        values = self.derived(stats.compute())
        stats.reset()
        return values

    def derived(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add what follows from the counted statistics, scalars by their logged names."""
        return values

    def on_train_epoch_end(self) -> None:
        """Log everything once per rollout (or pass): `self.log` in `training_step` costs 0.2 ms a key."""
        self.publish(self.stats, {"rollout/iteration": float(self.loop.iteration)})

    def publish(self, stats: MaskedStats, extra: Mapping[str, float] | None = None) -> None:
        """Reduce `stats` over the ranks, hand the values to every logger and the progress bar, and start anew."""
        values = {name: float(value) for name, value in self._reduced(stats).items()} | dict(extra or {})
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)
        self.tell_callbacks("on_metrics", values)
        monitored = {name: value for name, value in values.items() if name in self.progress_keys or name[:4] == "val/"}
        for name, value in monitored.items():
            self.log(name, value, prog_bar=name in self.progress_keys, logger=False, batch_size=1)

    def tell_callbacks(self, hook: str, about: Any) -> None:
        """Call a hook of `RLHFCallback`, for those that are one."""
        for callback in getattr(self._trainer, "callbacks", ()):
            if isinstance(callback, RLHFCallback):
                getattr(callback, hook)(self.trainer, self, about)

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Greedy and sampled completions of held-out prompts, see `validation_stats`."""
        cells = validation_stats(self, prompts)
        self.validation_stats.extend(cells)
        self.validation_stats.update(cells)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics; `val/accuracy_sampled` and its kin can be monitored by callbacks."""
        if self.trainer.sanity_checking:
            self.validation_stats.reset()
            return
        self.publish(self.validation_stats)
        self.validated_at = self.global_step

    # -- data ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the data module's reward functions: to train on where none were given, and to judge by in any case."""
        own = getattr(getattr(self.trainer, "datamodule", None), "reward_funcs", ())
        if self.rewards is None and own:
            self.rewards = RewardFunctions(own, timeout=self.reward_timeout)
        self.judges = Judges(self.rewards, own)

    def training_loader(self, rows_of: Callable[[int], Sequence[Row]]) -> Any:
        """What Lightning iterates over in training; `rows_of(i)` is the dataset of pass i."""
        raise NotImplementedError

    def validation_loader(self, rows: Sequence[Row], batch_size: int) -> PromptLoader:
        """Held-out prompts, sharded over the ranks."""
        self.judges.check(rows)
        return PromptLoader(rows, self.encode_prompt, batch_size, self.rank, self.world_size)

    def export_model(self) -> Any:
        """The Hugging Face model that a run leaves in its `model/` folder; adapters are merged into a copy."""
        policy = self.models.policy
        return merged(policy) if is_adapted(policy) else policy

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def run_shape(self) -> dict[str, Any]:
        """The settings that the loop's position depends on, by their key on the command line."""
        lora = lora_settings(self.models.policy)
        return {"seed": self.seed, "trainer.accumulate_grad_batches": self.accumulate, "model.lora": lora}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save every rank's loop state and metrics; called on all ranks.

        Within an optimiser step the metrics are those of its beginning, which is where a resumed run begins again.
        """
        within = self.loop.position % self.accumulate
        counted = self._before_step if within and self._before_step is not None else self._counted()
        own = {"loop": self.loop.to_plain(), **counted}
        ranks = gather_objects(own)
        checkpoint["lit_rlhf"] = {"algorithm": type(self).__name__, "shape": self.run_shape, "ranks": ranks}

    def _counted(self) -> dict[str, Any]:
        states = {"sums": self.stats.sums.clone(), "highs": self.stats.highs.clone()}
        return {"stats": states, "counted": dict(self.stats.wanted)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore this rank's loop state and metrics.

        Raises:
            InputError: the checkpoint cannot be continued from here, see `check_resumable`.
        """
        saved = checkpoint.get("lit_rlhf")
        check_resumable(saved, type(self).__name__, self.run_shape, self.world_size)
        check_same_model(checkpoint["state_dict"], self.state_dict())
        if self._trainer is not None and self.trainer.strategy.lightning_restore_optimizer:
            check_optimizer(checkpoint)
        own = checkpoint["lit_rlhf"]["ranks"][self.rank]
        self.loop = LoopState.from_plain(own.get("loop"))
        rewind_to_step(self.loop, checkpoint, self.accumulate)
        for name, statistics in own["counted"].items():
            self.stats.extend([name], statistics)
        for name, value in own["stats"].items():
            setattr(self.stats, name, value.to(self.device))

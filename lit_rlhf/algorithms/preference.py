"""The preference family: what learns from pairs of completions of one prompt, of which one is preferred."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf.algorithms.base import ModuleArgs, RLHFModule
from lit_rlhf.algorithms.passes import HeldOutLoader, pass_loader
from lit_rlhf.algorithms.preference_stats import Comparison, pair_stats, ranking
from lit_rlhf.data.collate import collate_preferences
from lit_rlhf.data.columns import complete_rows
from lit_rlhf.data.reference_cache import ReferenceCache
from lit_rlhf.errors import InputError, check_number
from lit_rlhf.functional.masked import zero_outside
from lit_rlhf.models.loading import vocabulary_size
from lit_rlhf.models.wrapper import ValueKind
from lit_rlhf.rollouts.loader import PassLoader, step_counts
from lit_rlhf.types import PreferenceBatch, PromptBatch, Row
from lit_rlhf.types.preference_dicts import preference_batch_from_dict


class PreferenceArgs(ModuleArgs, total=False):
    """The keyword arguments of `PreferenceModule`, which every preference algorithm passes on."""

    batch_size: int


class PreferenceModule(RLHFModule):
    """Template of the preference algorithms. One fit epoch is one pass over the pairs.

    A subclass overrides the one hook, `compare`: rewards and losses of pairs. The loss is their mean over all pairs of
    an optimiser step, whatever its micro-batches and ranks.

    Args:
        lr: AdamW's peak learning rate; by default `recommended_lr` of the policy's size.
        batch_size: pairs per optimiser step, over its micro-batches and ranks.
        reference: hold a frozen copy of the policy, unless there is a `reference_cache`.
        reference_cache: a folder. The reference's log-probs are computed once, kept there and found again by the next
            run with the same model and pairs, and no second model is held. The pairs must be the same in every pass.
        value: hold a value function, see `PolicyReferenceValue`.
        value_std: of its initial weights.
        **module: the arguments of `RLHFModule`.
    """

    completion_columns = ("chosen", "rejected")
    samples_in_validation: ClassVar[bool] = True  # completions too, where there are reward functions to judge them
    progress_keys = ("loss/loss", "preference/preference_accuracy")

    def __init__(
        self,
        *,
        lr: float | None = None,
        batch_size: int = 32,
        reference: bool = False,
        reference_cache: str | Path | None = None,
        value: ValueKind = "none",
        value_std: float = 0.0,
        **module: Unpack[ModuleArgs],
    ) -> None:
        held = reference and reference_cache is None
        super().__init__(lr=lr, reference=held, value=value, value_std=value_std, **module)
        check_number("algo.batch_size", batch_size, at_least=1)
        self.batch_size = batch_size
        self.cache = None if reference_cache is None else ReferenceCache(reference_cache)
        self.validation_stats.extend(["val/preference_accuracy", "val/reward_margin"])

    # -- the update ------------------------------------------------------------------------------------------------

    def compare(self, batch: PreferenceBatch) -> Comparison:
        """Hook: rewards, losses and further numbers of every pair, with gradient."""
        raise NotImplementedError

    def training_step(self, batch: PreferenceBatch | Mapping[str, Any], batch_idx: int = 0) -> Tensor:
        """One micro-batch's share of the step's mean loss over pairs, a scalar.

        Args:
            batch: pairs, or a dictionary of `chosen_input_ids`, `chosen_attention_mask`, `rejected_input_ids` and
                `rejected_attention_mask`, see `preference_batch_from_dict`.
            batch_idx: not used.
        """
        if not isinstance(batch, PreferenceBatch):
            batch = self.read_pairs(batch)
        return self.parts.loss(self, batch, self._loss)

    def _loss(self, batch: PreferenceBatch) -> Tensor:
        compared = self.compare(batch)
        self.count(pair_stats(compared, batch))
        return self.total_loss({name: self.mean_over_pairs(loss, batch) for name, loss in compared.losses.items()})

    def read_pairs(self, batch: Mapping[str, Any]) -> PreferenceBatch:
        """The dictionary's pairs on the module's device.

        Raises:
            InputError: the dictionary cannot be used, see `preference_batch_from_dict`.
        """
        size = vocabulary_size(self.models.policy)
        return preference_batch_from_dict(batch, self.tokenizer.pad_token_id, size).to(self.device)

    def mean_over_pairs(self, per_pair: Tensor, batch: PreferenceBatch) -> Tensor:
        """This micro-batch's share of the mean over the pairs of the optimiser step: its sum over their number.

        Args:
            per_pair: `[N]`; pairs without a single token count for nothing.
            batch: carries `step_rows`. Where it is missing the batch counts as one `accumulate`-th of the step.
        """
        pairs = batch.step_rows
        if pairs is None:
            pairs = step_counts([batch.response_mask], self.device)[1] * self.accumulate
        kept = torch.where(batch.response_mask.any(1), per_pair, torch.zeros_like(per_pair))
        return kept.sum() / pairs.clamp(min=1)

    def reference_logprobs(self, batch: PreferenceBatch) -> Tensor:
        """Log-probs `[2N, T]` of the chosen, then the rejected completions under the reference, 0 outside of them.

        Raises:
            InputError: neither the batch nor a model has any.
        """
        rows = batch.completions()
        if batch.ref_chosen is not None and batch.ref_rejected is not None:
            return zero_outside(torch.cat([batch.ref_chosen, batch.ref_rejected]).detach(), rows.response_mask)
        if self.cache is not None:
            raise InputError(
                "batch: it carries no reference log-probs, and with algo.reference_cache no reference model is held; "
                "leave algo.reference_cache out"
            )
        return self.models.score_reference(rows).logprobs

    # -- validation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Held-out pairs: accuracy and margin. Held-out prompts: see `RLHFModule.validation_step`."""
        if isinstance(batch, PromptBatch):
            super().validation_step(batch, batch_idx)
        else:
            self.validation_stats.update(ranking("val", self.compare(batch), batch))

    def validation_loader(self, rows: Sequence[Row], batch_size: int) -> Any:
        """Held-out pairs, those of the rows that have one, and prompts where there are rewards; by rank."""
        pairs = complete_rows(rows, self.completion_columns)
        if self.cache is not None:
            self.cache.prepare(self, pairs)
        loaders: list[Any] = []
        if self.rewards is not None and self.samples_in_validation:
            loaders.append(super().validation_loader(rows, batch_size))
        if pairs:
            loaders.append(HeldOutLoader(pairs, self.collate, batch_size, self.rank, self.world_size))
        return loaders

    # -- data ----------------------------------------------------------------------------------------------------

    @property
    def run_shape(self) -> dict[str, Any]:
        """See `RLHFModule.run_shape`."""
        cache = "null" if self.cache is None else "a folder"
        return {**super().run_shape, "algo.batch_size": self.batch_size, "algo.reference_cache": cache}

    def collate(self, rows: Sequence[Row]) -> PreferenceBatch:
        """Rows with `prompt`, `chosen` and `rejected` to a batch."""
        batch = collate_preferences(self.encoder, rows, self.tokenizer.pad_token_id, self.row_limit)
        return batch if self.cache is None else self.cache.attach(batch, rows)

    def training_loader(self, rows_of: Callable[[int], Sequence[Row]]) -> PassLoader:
        """Micro-batches of pairs: rows with `prompt`, `chosen` and `rejected`."""
        loader = pass_loader(self, rows_of, self.collate, self.batch_size, self.completion_columns, "pairs")
        if self.cache is not None:
            self.cache.prepare(self, rows_of(0), next_pass=rows_of(1))
        return loader

    # -- the reference's identity, where it is no model -------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """The policy is the reference as long as it is untrained."""
        super().setup(stage)
        if self.cache is not None:
            self.cache.identify(self.models.policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which weights are the reference, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_rlhf"]["reference"] = self.cache and self.cache.reference

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them: the policy is a trained one from here on."""
        super().on_load_checkpoint(checkpoint)
        if self.cache is not None:
            self.cache.reference = checkpoint["lit_rlhf"]["reference"]

"""SFT: supervised fine-tuning, the cross-entropy of completions.

    L = -1/M sum_i sum_t log pi_theta(y_it | x_i, y_i<t)          M: completion tokens of the step, EOS included

Prompt and padding carry no loss. M counts over all micro-batches and ranks of the optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf.algorithms.base import ModuleArgs, RLHFModule
from lit_rlhf.algorithms.passes import HeldOutLoader, pass_loader
from lit_rlhf.data.collate import collate_completions
from lit_rlhf.data.columns import complete_rows
from lit_rlhf.errors import check_number
from lit_rlhf.rollouts.loader import PassLoader
from lit_rlhf.types import CompletionBatch, PromptBatch, Row


class SFT(RLHFModule):
    """Maximise the likelihood of the demonstrations' completions.

    Choose it when there are demonstrations; it is also the usual first stage of all the others.

    Example:
        module = SFT(policy="tiny", lr=1e-4)

    Args:
        batch_size: demonstrations per optimiser step, over its micro-batches and ranks.
        lr: the field's usual 2e-5, and ten times that for LoRA adapters; small models want more.
        **module: the arguments of `RLHFModule`.
    """

    learns_from_feedback = False
    completion_columns = ("completion",)
    usual_lr = 2e-5
    stats_spec: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "loss/loss": ("value",),
        "loss/sft_loss": ("value",),
        "stability/grad_norm": ("value",),
        "stability/skipped_fraction": ("value",),
        "rollout/response_length": ("value", "max"),
    }

    def __init__(self, *, batch_size: int = 32, lr: float | None = None, **module: Unpack[ModuleArgs]) -> None:
        super().__init__(lr=lr, **module)
        check_number("algo.batch_size", batch_size, at_least=1)
        self.batch_size = batch_size

    @property
    def run_shape(self) -> dict[str, Any]:
        """See `RLHFModule.run_shape`."""
        return {**super().run_shape, "algo.batch_size": self.batch_size}

    def training_step(self, batch: CompletionBatch, batch_idx: int = 0) -> Tensor:
        """One micro-batch's share of the step's mean negative log-likelihood, a scalar."""
        self.stats.update({"rollout/response_length": (batch.response_mask.sum(1).float(), None)})
        return self.parts.loss(self, batch, self._loss)

    def _loss(self, batch: CompletionBatch) -> Tensor:
        logprobs = self.models.score(batch).logprobs
        return self.total_loss({"sft_loss": self.aggregate(-logprobs, batch)})

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Held-out demonstrations: the loss of a token. Held-out prompts: see `RLHFModule.validation_step`."""
        if isinstance(batch, PromptBatch):
            super().validation_step(batch, batch_idx)
        else:
            cells = {"val/sft_loss": (-self.models.score(batch).logprobs, batch.response_mask)}
            self.validation_stats.extend(cells)
            self.validation_stats.update(cells)

    def derived(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the perplexity of held-out demonstrations, exp of the mean loss of their tokens."""
        loss = values.get("val/sft_loss")
        return values if loss is None else {**values, "val/perplexity": torch.exp(loss)}

    def validation_loader(self, rows: Sequence[Row], batch_size: int) -> Any:
        """Held-out demonstrations, those of the rows that have one, and prompts where there are rewards; by rank."""
        loaders: list[Any] = [super().validation_loader(rows, batch_size)] if self.rewards is not None else []
        if shown := complete_rows(rows, self.completion_columns):
            loaders.append(HeldOutLoader(shown, self.collate, batch_size, self.rank, self.world_size))
        return loaders

    def training_loader(self, rows_of: Callable[[int], Sequence[Row]]) -> PassLoader:
        """Micro-batches of demonstrations: rows with `prompt` and `completion`."""
        return pass_loader(self, rows_of, self.collate, self.batch_size, self.completion_columns, "demonstrations")

    def collate(self, rows: Sequence[Row]) -> CompletionBatch:
        """Rows with `prompt` and `completion` to a batch."""
        return collate_completions(self.encoder, rows, self.tokenizer.pad_token_id, self.row_limit)

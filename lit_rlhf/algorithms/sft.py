"""SFT: supervised fine-tuning, the cross-entropy of completions.

    L = -1/M sum_i sum_t log pi_theta(y_it | x_i, y_i<t)          M: completion tokens of the step, EOS included

Prompt and padding carry no loss. M counts over all micro-batches and ranks of the optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf.algorithms.base import ModuleArgs, RLHFModule
from lit_rlhf.algorithms.passes import pass_loader
from lit_rlhf.data.collate import collate_completions
from lit_rlhf.errors import check_number
from lit_rlhf.rollouts.loader import PassLoader
from lit_rlhf.types import CompletionBatch, Row


class SFT(RLHFModule):
    """Maximise the likelihood of the demonstrations' completions.

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
        """One micro-batch's share of the step's mean negative log-likelihood."""
        logprobs = self.models.score(batch).logprobs
        self.stats.update({"rollout/response_length": (batch.response_mask.sum(1).float(), None)})
        return self.total_loss({"sft_loss": self.aggregate(-logprobs, batch)})

    def training_loader(self, rows_of: Callable[[int], Sequence[Row]]) -> PassLoader:
        """Micro-batches of demonstrations: rows with `prompt` and `completion`."""
        return pass_loader(self, rows_of, self.collate, self.batch_size, self.completion_columns, "demonstrations")

    def collate(self, rows: Sequence[Row]) -> CompletionBatch:
        """Rows with `prompt` and `completion` to a batch."""
        return collate_completions(self.encoder, rows, self.tokenizer.pad_token_id, self.row_limit)

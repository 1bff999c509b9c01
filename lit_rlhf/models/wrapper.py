"""The models that an algorithm trains with, behind one object: policy and reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import disable_dropout, load_causal_lm, load_tokenizer, prepare_tokenizer, vocabulary_size
from lit_rlhf.models.scoring import Scores, score
from lit_rlhf.types import CompletionBatch, Rollout

_LARGEST_PADDING = 127  # embeddings are padded to a multiple of 64 or 128


class PolicyReferenceValue(nn.Module):
    """Policy and frozen reference of one training run; the value function comes with the critic algorithms.

    Args:
        policy: any Hugging Face causal language model, or the name or path of one. Its dropout is set to 0.
        reference: keep a frozen copy of the policy as it is now. Without it no second model is held.

    The reference stays in eval mode and without gradients whatever Lightning or a caller does.
    """

    def __init__(self, policy: nn.Module | str | Path, *, reference: bool = False) -> None:
        super().__init__()
        self.policy: Any = disable_dropout(policy) if isinstance(policy, nn.Module) else load_causal_lm(policy)
        self.policy.train()
        self.reference: Any = copy.deepcopy(self.policy).requires_grad_(False).eval() if reference else None

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of everything but the reference."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def score(self, batch: Rollout | CompletionBatch, *, temperature: float = 1.0, entropy: bool = False) -> Scores:
        """Log-probs `[N, T]` (and entropy) of the batch's completions under the policy, with gradient."""
        return _score(self.policy, batch, temperature, entropy)

    @torch.no_grad()
    def score_reference(self, batch: Rollout | CompletionBatch, *, temperature: float = 1.0) -> Scores:
        """Log-probs `[N, T]` of the batch's completions under the frozen reference."""
        if self.reference is None:
            raise RuntimeError("there is no reference model; build PolicyReferenceValue(..., reference=True)")
        return _score(self.reference, batch, temperature, entropy=False)


def tokenizer_for(policy: nn.Module | str | Path, tokenizer: Any = None) -> Any:
    """The tokenizer given, or loaded by name or path, or the policy's own; with EOS, a pad token, padding on the left.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    if tokenizer is None:
        tokenizer = policy if not isinstance(policy, nn.Module) else getattr(policy, "name_or_path", "")
    if tokenizer == "":
        raise InputError(
            "tokenizer: the policy was not loaded from anywhere and has none of its own; give tokenizer=..., a folder, "
            "a Hub name or 'tiny'"
        )
    found = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else prepare_tokenizer(tokenizer)
    if tokenizer is not policy:
        _check_vocabulary(policy, found)
    return found


def _check_vocabulary(policy: nn.Module | str | Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that is clearly not the policy's: ids would be read, or sampled, that mean nothing."""
    size = vocabulary_size(policy)
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else size
    if tokenizer.eos_token_id < size <= max(2 * known, known + _LARGEST_PADDING):
        return
    raise InputError(
        f"tokenizer: it has {known} tokens, EOS is {tokenizer.eos_token_id}, and the model's vocabulary has {size}: "
        "give the model's own tokenizer, or resize the model's embeddings"
    )


def _score(model: nn.Module, batch: Rollout | CompletionBatch, temperature: float, entropy: bool) -> Scores:
    return score(
        model,
        batch.prompt_ids,
        batch.prompt_mask,
        batch.response_ids,
        batch.response_mask,
        temperature=temperature,
        entropy=entropy,
    )

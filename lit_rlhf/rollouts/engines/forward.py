"""The model with its cache, mask and positions: rows are admitted with their prompts, then decoded token by token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.engines.cache import new_cache
from lit_rlhf.rollouts.engines.shared import ATTENTION, NotShareableError, SharedPrompts, can_share
from lit_rlhf.types import pad_left


class Forward:
    """The plain way, for every model with a key-value cache: Transformers' own, each row with its prompt.

    Args:
        model: a Hugging Face causal LM.
        prompt_ids: token ids of every prompt.
        steps: `max_new_tokens`.
        preallocate: allocate the cache once instead of growing it at every token.
    """

    joins = False  # whether rows can be admitted while others are in the batch

    def __init__(self, model: Any, prompt_ids: Sequence[Sequence[int]], steps: int, preallocate: bool = True) -> None:
        self.model, self.prompt_ids, self.steps, self.preallocate = model, prompt_ids, steps, preallocate
        self.device = next(model.parameters()).device
        bare = getattr(model, "_orig_mod", model)  # of torch.compile
        # A compiled forward would be traced again at every token, were it to count what it has decoded.
        self.compiled = bare is not model or getattr(model, "_compiled_call_impl", None) is not None
        self.base = base = getattr(bare, "get_base_model", lambda: bare)()  # of PEFT
        named = inspect.signature(base.forward).parameters
        if "past_key_values" not in named:  # its **kwargs would swallow the cache: every token sampled from one alone
            raise InputError(
                f"{type(base).__name__} takes no past_key_values, so that it cannot be sampled from here; use a model "
                "with a key-value cache, or give the algorithm an engine of your own"
            )
        self.takes_position, self.takes_logits_to_keep = "position_ids" in named, "logits_to_keep" in named

    def admit(self, prompts: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Run `prompts` once; `counts[i]` new rows continue the i-th. Returns the new rows' logits `[k, V]`."""
        ids, mask = self._padded(prompts)
        self.cache = new_cache(self.model.config, ids.shape[1] + self.steps - 1, self.preallocate)
        logits = self._prefill(ids, mask, self.cache)
        self.length = ids.shape[1]  # columns in the cache, padding included
        self.attention = torch.cat([mask.long(), mask.new_ones((len(ids), self.steps), dtype=torch.long)], 1)
        self.position = mask.sum(1, keepdim=True)  # [n, 1] of the next token
        if max(counts) == 1:
            return logits
        rows = _repeated(counts, self.device)
        self.select(rows)
        return logits[rows]

    def decode(self, token: Tensor) -> Tensor:
        """Append one token per row, `[n]`; returns their logits `[n, V]`."""
        self.length += 1
        logits = self._run(token.unsqueeze(1), self.attention[:, : self.length], self.position, self.cache)
        self.position = self.position + 1
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        self.cache.reorder_cache(rows)  # unlike batch_select_indices, every kind of layer has it
        self.attention, self.position = self.attention[rows], self.position[rows]

    def _padded(self, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids, mask = pad_left([self.prompt_ids[i] for i in prompts], 0)
        return ids.to(self.device), mask.to(self.device)

    def _prefill(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        return self._run(ids, mask.long(), (mask.cumsum(1) - 1).clamp(min=0), cache)

    def _run(self, ids: Tensor, attention: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        extra: dict[str, Any] = {"position_ids": positions} if self.takes_position else {}
        if self.takes_logits_to_keep:
            extra["logits_to_keep"] = 1
        out = self.model(input_ids=ids, attention_mask=attention, past_key_values=cache, use_cache=True, **extra)
        logits: Tensor = out.logits[:, -1]
        return logits


class SharedForward(Forward):
    """Prompts stored once and attended to once for all their rows (`shared.py`); rows may join at any time.

    Raises:
        NotShareableError: when the first rows are admitted or decoded, for a model that this is not right for.
    """

    joins = True
    shared: SharedPrompts | None = None

    def admit(self, prompts: Sequence[int], counts: Sequence[int]) -> Tensor:
        """See `Forward.admit`."""
        ids, mask = self._padded(prompts)
        prefilled = new_cache(self.model.config, 0, preallocate=False)
        if self.compiled or not self.takes_position or not can_share(self.base, prefilled):
            raise NotShareableError
        logits, rows = self._prefill(ids, mask, prefilled), _repeated(counts, self.device)
        position = mask.sum(1, keepdim=True)[rows]
        if self.shared is None:
            self.shared, self.position = SharedPrompts(len(prefilled.layers), self.steps), position
            self.last_position = max(map(len, self.prompt_ids)) + self.steps - 1
        else:
            self.position = torch.cat([self.position, position])
        self.shared.admit(prefilled, mask, counts)
        return logits[rows]

    def decode(self, token: Tensor) -> Tensor:
        """See `Forward.decode`."""
        assert self.shared is not None
        config, before = self.base.config, self.shared.attended
        usual = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            logits = self._run(token.unsqueeze(1), None, self.position, self.shared)
        finally:
            config._attn_implementation = usual
        if self.shared.attended != before + len(self.shared.layers):
            raise NotShareableError
        self.shared.length += 1
        self.position = (self.position + 1).clamp_max(self.last_position)  # rows that have ended may stay for a while
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in ascending order, each once."""
        assert self.shared is not None
        self.shared.select(rows)
        self.position = self.position[rows]


def _repeated(counts: Sequence[int], device: torch.device) -> Tensor:
    """`[0, 0, 1, 1, 1, ...]`: index i, `counts[i]` times."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)

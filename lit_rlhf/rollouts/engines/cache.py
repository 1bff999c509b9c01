"""A key-value cache whose length is known in advance: allocated once, written in place.

Transformers' `DynamicLayer` concatenates at every token, which copies the whole cache each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A full-attention layer that holds up to `capacity` positions.

    The first update (the prompt) is kept as it comes. The buffers are allocated when rows are repeated or
    selected, or at the next update, so that a prompt's cache is never stored twice. `keys` and `values`
    are views of the part in use, which is all that the inherited methods look at.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[rows, heads, new, dim]`; returns everything held so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self._buffers = key_states, value_states, None
            return self.keys, self.values
        if self._buffers is None:
            self._buffers = self._allocated(self.keys), self._allocated(self.values)
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order; a row may be taken several times."""
        if self.get_seq_length() == 0:
            return
        length, index = self.get_seq_length(), beam_idx.to(self.keys.device)
        self._buffers = self._allocated(self.keys, index), self._allocated(self.values, index)
        self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.get_seq_length() > 0:
            self.reorder_cache(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def _allocated(self, held: Tensor, rows: Tensor | None = None) -> Tensor:
        held = held if rows is None else held.index_select(0, rows)
        buffer = held.new_empty(*held.shape[:-2], self.capacity, held.shape[-1])
        buffer[..., : held.shape[-2], :] = held
        return buffer


def new_cache(config: Any, capacity: int, preallocate: bool = True) -> Any:
    """Make an empty cache for a model: the one Transformers would, its plain layers preallocated.

    Layers that are not plain full attention (sliding window, linear attention, shared) stay as they are.
    """
    cache = DynamicCache(config=config)
    if preallocate:
        cache.layers = [PreallocatedLayer(capacity) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache

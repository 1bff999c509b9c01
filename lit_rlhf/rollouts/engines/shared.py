"""Decoding with prompts that are stored once: the samples of a prompt share its keys and values.

One new token per row attends to the prompt (one matrix product per prompt, for all of its rows) and to the row's
own tokens. What it computes is what Transformers' `sdpa` would from a cache with the prompt repeated for every row:
with G samples a prompt is read and held once instead of G times, and no mask is built at a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

ATTENTION = "lit_rlhf_shared_prompts"  # no mask function is registered for it: models then build no mask
_HARMLESS = {"dropout", "position_ids", "cache_position", "use_cache", "is_causal"}  # one query sees all that is held
_LAYER = "shared_layer"  # attribute of the keys and values that a model hands from its cache to its attention
_KEEP_PROMPTS = 0.75  # prompts without rows are dropped once fewer than this share still has some


class NotShareableError(Exception):
    """The model's attention is more than `sdpa` over its cache: it has to be decoded the plain way."""


class SharedPrompts(Cache):  # type: ignore[misc]  # transformers is untyped
    """A cache of B prompts and n rows, each of which continues one of them.

    Args:
        layers: how many the model has.
        steps: most tokens that are decoded after a row was admitted.
    """

    def __init__(self, layers: int, steps: int) -> None:
        super().__init__(layers=[SharedLayer(self) for _ in range(layers)])
        self.steps = steps
        self.length = 0  # columns of the rows' own tokens in use
        self.owner: list[int] = []  # [n] the prompt of each row; a prompt's rows are neighbours
        self.start: list[int] = []  # [n] the first column that is the row's own
        self.mask: Tensor | None = None  # [B, P] bool, the prompts without their left padding
        self.attended = 0  # calls of `attend`

    def admit(self, prefilled: DynamicCache, mask: Tensor, counts: Sequence[int]) -> None:
        """Take over the prompts of a prefilled cache, `mask` `[b, P]`; `counts[i]` new rows continue the i-th."""
        held = 0 if self.mask is None else len(self.mask)
        for layer, new in zip(self.layers, prefilled.layers, strict=True):
            layer.add_prompts(new.keys, new.values)
        self.mask = mask if self.mask is None else torch.cat(_widened(self.mask, mask))
        self.owner += [held + i for i, count in enumerate(counts) for _ in range(count)]
        self.start += [self.length] * sum(counts)
        self._lay_out()
        for layer in self.layers:
            layer.make_room(None)

    def select(self, rows: Tensor) -> None:
        """Keep the rows `rows`, in ascending order, the prompts that they continue and the columns they own."""
        kept: list[int] = rows.tolist()
        self.owner, self.start = [self.owner[i] for i in kept], [self.start[i] for i in kept]
        unused = min(self.start, default=self.length)
        alive = sorted(set(self.owner))
        assert self.mask is not None
        if len(alive) < _KEEP_PROMPTS * len(self.mask):
            index = torch.tensor(alive, dtype=torch.long, device=self.mask.device)
            self.mask = self.mask[index]
            padding = self.mask.shape[1] - max(self.mask.sum(1).tolist(), default=0)
            self.mask = self.mask[:, padding:]
            for layer in self.layers:
                layer.select_prompts(index, padding)
            self.owner = [alive.index(i) for i in self.owner]
        self.length -= unused
        self.start = [i - unused for i in self.start]
        self._lay_out()
        for layer in self.layers:
            layer.make_room(rows, unused)

    def _lay_out(self) -> None:
        """Work out what the layers have in common: widths, a row's place beside its siblings, what is hidden."""
        assert self.mask is not None
        device, count = self.mask.device, Counter(self.owner)
        self.capacity = max(self.start, default=0) + self.steps
        self.prompts, self.width = len(self.mask), max(count.values(), default=0)
        self.slot: Tensor | None = None  # [n] in [0, B * width); None where every prompt has `width` rows
        if len(self.owner) < self.prompts * self.width:
            first = {owner: self.owner.index(owner) for owner in count}
            slots = [owner * self.width + i - first[owner] for i, owner in enumerate(self.owner)]
            self.slot = torch.tensor(slots, dtype=torch.long, device=device)
        self.hidden_prompt = None if bool(self.mask.all()) else _bias(~self.mask)
        self.hidden_own = None
        if any(self.start):
            columns = torch.arange(self.capacity, device=device)
            self.hidden_own = _bias(columns < torch.tensor(self.start, device=device).unsqueeze(1))


class SharedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer of `SharedPrompts`: keys and values of the prompts `[B, heads, P, dim]` and of the rows' own tokens."""

    is_sliding = False

    def __init__(self, shared: SharedPrompts) -> None:
        super().__init__()
        self.shared = shared
        self.prompt: tuple[Tensor, ...] = ()
        self.own: tuple[Tensor, ...] = ()  # [n, heads, capacity, dim]

    def add_prompts(self, keys: Tensor, values: Tensor) -> None:
        """Append prompts, `[b, heads, p, dim]`."""
        held, new = self.prompt, (keys, values)
        self.prompt = tuple(torch.cat(_widened(*x, dim=2)) for x in zip(held, new, strict=True)) if held else new

    def select_prompts(self, index: Tensor, padding: int) -> None:
        """Keep the prompts `index`, without their first `padding` columns."""
        self.prompt = tuple(x.index_select(0, index)[:, :, padding:] for x in self.prompt)

    def make_room(self, rows: Tensor | None, unused: int = 0) -> None:
        """Move the own tokens of `rows` (None: all, followed by new rows) into buffers of the present capacity.

        Columns are zero where a row has no token: hidden by a weight of zero, they have to be numbers.
        """
        moved = []
        for i, prompt in enumerate(self.prompt):
            buffer = prompt.new_zeros(len(self.shared.owner), prompt.shape[1], self.shared.capacity, prompt.shape[3])
            if self.own and self.shared.length:
                held = self.own[i][:, :, unused : unused + self.shared.length]
                held = held if rows is None else held.index_select(0, rows)
                buffer[: len(held), :, : self.shared.length] = held
            moved.append(buffer)
        self.own, self.is_initialized = tuple(moved), True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row. The views returned lead `attend` back here."""
        at = self.shared.length
        for buffer, states in zip(self.own, (key_states, value_states), strict=True):
            buffer[:, :, at : at + 1] = states
        keys, values = (buffer[:, :, : at + 1] for buffer in self.own)
        for view in (keys, values):
            setattr(view, _LAYER, self)
        return keys, values

    def attend(self, query: Tensor, scaling: float, keys: Tensor, values: Tensor) -> Tensor:
        """The attention of one query per row, `[n, H, 1, dim]`, to its prompt and its own tokens: `[n, 1, H, dim]`."""
        shared, (prompt_keys, prompt_values) = self.shared, self.prompt
        n, heads = query.shape[:2]
        # Heads that share keys and values stand where the queries of a sequence would, and so do siblings.
        q = (query * scaling).reshape(n, keys.shape[1], heads // keys.shape[1], -1)
        to_prompt = torch.matmul(self._together(q), prompt_keys.transpose(2, 3))
        to_own = torch.matmul(q, keys.transpose(2, 3))
        if shared.hidden_prompt is not None:
            to_prompt += shared.hidden_prompt
        if shared.hidden_own is not None:
            to_own += shared.hidden_own[..., : keys.shape[2]]
        scores = torch.cat([self._apart(to_prompt), to_own], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        length = prompt_keys.shape[2]
        from_prompt = torch.matmul(self._together(weights[..., :length]), prompt_values)
        out = self._apart(from_prompt) + torch.matmul(weights[..., length:], values)
        return out.reshape(n, 1, heads, -1)

    def _together(self, x: Tensor) -> Tensor:
        """`[n, heads, r, k]` of rows to `[B, heads, width * r, k]` of prompts; unused slots are zero."""
        B, W = self.shared.prompts, self.shared.width
        if self.shared.slot is not None:
            x = x.new_zeros(B * W, *x.shape[1:]).index_copy_(0, self.shared.slot, x)
        return x if W == 1 else x.view(B, W, *x.shape[1:]).transpose(1, 2).flatten(2, 3)

    def _apart(self, x: Tensor) -> Tensor:
        """Undo `_together`."""
        if self.shared.width > 1:
            B, heads, _, size = x.shape
            x = x.view(B, heads, self.shared.width, -1, size).transpose(1, 2).flatten(0, 1)
        return x if self.shared.slot is None else x.index_select(0, self.shared.slot)

    def get_seq_length(self) -> int:
        """Columns held, of the widest prompt and of the rows' own tokens."""
        return (self.prompt[0].shape[2] if self.prompt else 0) + self.shared.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask, for a model that builds one."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """`SharedPrompts.admit` does it."""
        raise NotShareableError


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `sdpa` is to a model in training, for a model that decodes from `SharedPrompts`.

    Raises:
        NotShareableError: there is a mask, a bias, a cap or anything else that plain attention does not have.
    """
    layer: SharedLayer | None = getattr(key, _LAYER, None)
    more = any(given is not None and given is not False for name, given in kwargs.items() if name not in _HARMLESS)
    more |= attention_mask is not None or getattr(value, _LAYER, None) is not layer
    if layer is None or more:
        raise NotShareableError
    layer.shared.attended += 1
    return layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling, key, value), None


def can_share(model: Any, prefilled: Any) -> bool:
    """Whether a model attends by `sdpa`, in the way that can be replaced, to a plain cache.

    What more it does shows at the first token, in `attend`.
    """
    plain = type(prefilled) is DynamicCache and all(type(layer) is DynamicLayer for layer in prefilled.layers)
    if not plain or not getattr(model, "_supports_attention_backend", False):
        return False
    return model.config._attn_implementation == "sdpa" and not model.config.sub_configs


def _widened(a: Tensor, b: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Both padded on the left with zeros to the larger size of `dim`."""
    size = max(a.shape[dim], b.shape[dim])
    missing = [x.new_zeros(*x.shape[:dim], size - x.shape[dim], *x.shape[dim + 1 :]) for x in (a, b)]
    return torch.cat([missing[0], a], dim), torch.cat([missing[1], b], dim)


def _bias(hidden: Tensor) -> Tensor:
    """What is added to the scores `[rows, heads, queries, columns]` where `[rows, columns]` is hidden."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None, None]


AttentionInterface.register(ATTENTION, attend)

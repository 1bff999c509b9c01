"""The forward pass over completions, on as few tokens as will do.

Rows are read without padding between prompt and response and a few at a time, by length; a prompt that several rows
have is read once, and their responses behind its keys and values. Row by row, what comes out is the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, modeling_utils

from lit_rlhf.models.output_layer import continues_from_cache
from lit_rlhf.models.parallel import is_sharded
from lit_rlhf.ranks import most_over_ranks
from lit_rlhf.types import CompletionBatch, PreferenceBatch, Rollout

Completions = Rollout | CompletionBatch
_KEEPS_CELLS = hasattr(modeling_utils, "slice_logits_to_keep")  # `logits_to_keep` of older ones is of whole columns
_TOKENS_OF_A_PASS = {"cpu": 128}  # the number of tokens that one more forward pass costs as much as; elsewhere 2048
_TOKENS_AT_ONCE = {"cpu": 4096}  # beyond, more rows gain nothing, and on a CPU fresh memory costs; elsewhere 65536


@dataclass(frozen=True)
class Shortcuts:
    """What makes scoring faster or smaller. None of it changes a result but for rounding.

    Args:
        share_prompts: read a prompt once for all the rows that have it.
        sort_by_length: run rows of different lengths apart, where that saves more padding than a forward pass costs.
        chunk_vocabulary: never hold the logits of all tokens, see `functional.linear_logprobs`.
        torch_compile: run the model through `torch.compile`, with dynamic shapes; the first passes take long. No prompt
            is then shared.
    """

    share_prompts: bool = True
    sort_by_length: bool = True
    chunk_vocabulary: bool = True
    torch_compile: bool = False


@dataclass(frozen=True)
class Part:
    """What a model says of some of the rows, at K of their response tokens."""

    row: Tensor  # [K] which row a token is of
    step: Tensor  # [K] which token of the response it is
    states: Tensor  # [K, C] before the token: hidden states, or the logits of a model with its output layer
    rows: Tensor  # [n] the part's rows
    last: Tensor | None  # [n, C] after the last token; None of a model with its output layer
    hidden: Tensor | None = None  # [K, H] hidden states, of a model with its output layer, where they are asked for


def forward_parts(
    model: nn.Module, rows: Completions, shortcuts: Shortcuts, with_hidden: bool = False
) -> Iterator[Part]:
    """Run the model over the rows, in parts that together are all of them.

    Args:
        model: a trunk; or a language model, of which the states are the logits, computed where they are asked for.
        rows: prompts `[N, P]`, left-padded, and responses `[N, T]`, right-padded; what stands in padded cells does not
            matter. False cells of `response_mask` before a row's last true one are attended to.
        shortcuts: which to take.
        with_hidden: of a language model the last hidden states, too.
    """
    sharded, device = is_sharded(model), rows.response_ids.device
    if not len(rows):
        if sharded:
            yield from _beside_other_ranks(model, 0, device, with_hidden)
        return
    read = _Rows.of(rows)
    cost, most = _TOKENS_OF_A_PASS.get(device.type, 2048), _TOKENS_AT_ONCE.get(device.type, 65536)
    limits = (cost, most) if shortcuts.sort_by_length else None
    share = shortcuts.share_prompts and not shortcuts.torch_compile and continues_from_cache(model)
    shared = read.distinct_prompts() if share else None
    if shared is None or int(read.prompt_lengths.sum() - shared[0].prompt_lengths.sum()) <= cost:
        passes = by_length((read.prompt_lengths + read.response_lengths).cpu(), limits)
        if sharded:
            yield from _beside_other_ranks(model, len(passes), device, with_hidden)
        for some in passes:
            yield _in_one(model, read, some.to(device), shortcuts.torch_compile, with_hidden)
        return
    prompts, of_row = shared
    for some in by_length(prompts.prompt_lengths.cpu(), limits):
        number = torch.full_like(prompts.prompt_lengths, -1)
        number[some] = torch.arange(len(some), device=device)
        yield from _behind_prompts(model, read, prompts.select(some), number[of_row], limits)


def by_length(lengths: Tensor, limits: tuple[int, int] | None) -> list[Tensor]:
    """Split rows into batches of similar length.

    Args:
        lengths: `[N]`, on the CPU.
        limits: split where that saves more padding than the first number of tokens, and where a batch would have more
            than the second; None keeps all rows together.

    >>> by_length(torch.tensor([5, 900, 4, 1000]), (100, 10_000))
    [tensor([3, 1]), tensor([0, 2])]
    """
    order = lengths.argsort(descending=True, stable=True)
    if limits is None or len(lengths) < 2:
        return [order]
    cost, most = limits
    batches: list[Tensor] = []
    waiting = [order]
    while waiting:
        rows = waiting.pop()
        ordered = lengths[rows]
        saved = torch.arange(len(rows), 0, -1) * (ordered[0] - ordered)
        cut = int(saved.argmax())
        if saved[cut] > cost:
            waiting += [rows[cut:], rows[:cut]]
        else:
            batches += torch.split(rows, max(most // max(int(ordered[0]), 1), 1))
    return batches


@dataclass(frozen=True)
class _Rows:
    """Prompts and responses, each beginning in column 0."""

    prompts: Tensor  # [N, P]
    prompt_lengths: Tensor  # [N], at least 1
    responses: Tensor  # [N, T]
    response_lengths: Tensor  # [N], of what is attended to
    scored: Tensor  # [N, T] bool

    @classmethod
    def of(cls, rows: Completions) -> _Rows:
        mask, scored = rows.prompt_mask.bool(), rows.response_mask.bool()
        ids = rows.prompt_ids.masked_fill(~mask, 0)
        if not mask.shape[1]:
            ids, mask = (x.new_zeros(len(x), 1) for x in (ids, mask))
        attended = scored.flip(1).cumsum(1).flip(1) > 0
        first = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        prompts = ids.gather(1, first)
        lengths = mask.sum(1).clamp(min=1)  # a row without a prompt begins with token 0
        widest = int(lengths.max())
        responses = rows.response_ids.masked_fill(~attended, 0)
        return cls(prompts[:, :widest], lengths, responses, attended.sum(1), scored)

    def select(self, index: Tensor) -> _Rows:
        """The rows `index`."""
        lengths = self.prompt_lengths[index]
        prompts = self.prompts[index, : int(lengths.max())]
        return _Rows(prompts, lengths, self.responses[index], self.response_lengths[index], self.scored[index])

    def distinct_prompts(self) -> tuple[_Rows, Tensor]:
        """Every prompt once, without responses, and the number `[N]` of each row's."""
        keys = torch.cat([self.prompt_lengths.unsqueeze(1), self.prompts], dim=1)
        kept, of_row = torch.unique(keys, dim=0, return_inverse=True)
        nothing = kept[:, :0]
        return _Rows(kept[:, 1:], kept[:, 0], nothing, torch.zeros_like(kept[:, 0]), nothing.bool()), of_row

    def scored_cells(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Row, counted among `rows`, and step of every scored token of theirs, `[K]` each."""
        row, step = self.scored[rows].nonzero(as_tuple=True)
        return row, step


def _in_one(model: Any, read: _Rows, rows: Tensor, compiled: bool, with_hidden: bool) -> Part:
    """Prompt and response of each row in one; nothing is masked, since what follows a row cannot be attended to."""
    prompt, response = read.prompt_lengths[rows], read.response_lengths[rows]
    column = torch.arange(int((prompt + response).max()), device=rows.device).unsqueeze(0)
    behind = column - prompt.unsqueeze(1)
    of_prompt = read.prompts[rows].gather(1, column.expand(len(rows), -1).clamp(max=read.prompts.shape[1] - 1))
    of_response = read.responses[rows].gather(1, behind.clamp(0, read.responses.shape[1] - 1))
    ids = torch.where(behind < 0, of_prompt, of_response.masked_fill(behind >= response.unsqueeze(1), 0))
    row, step = read.scored_cells(rows)
    cell = prompt[row] + step - 1
    run = functools.partial(_compiled(type(model).forward), model) if compiled else model
    named = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters  # of torch.compile's own module
    extra: dict[str, Any] = {"output_hidden_states": True} if with_hidden else {}
    if keeps := _KEEPS_CELLS and "logits_to_keep" in named:
        wanted = torch.zeros_like(ids, dtype=torch.bool).index_put((row, cell), torch.ones_like(row, dtype=torch.bool))
        extra["logits_to_keep"] = wanted
    found = run(input_ids=ids, use_cache=False, **extra)
    if hasattr(found, "last_hidden_state"):
        hidden = found.last_hidden_state
        last = hidden[torch.arange(len(rows), device=rows.device), prompt + response - 1]
        return Part(rows[row], step, hidden[row, cell], rows, last)
    logits = found.logits if keeps else found.logits[row, cell]
    return Part(rows[row], step, logits, rows, None, found.hidden_states[-1][row, cell] if with_hidden else None)


def _beside_other_ranks(model: Any, passes: int, device: torch.device, with_hidden: bool) -> Iterator[Part]:
    """Passes of nothing, so that this rank runs a sharded model as often as any other does."""
    one = torch.ones(1, dtype=torch.long, device=device)
    token, none = one.unsqueeze(1) * 0, one * 0
    read = _Rows(token, one, token, none, token.bool())
    for _ in range(most_over_ranks(passes, device) - passes):
        part = _in_one(model, read, none, compiled=False, with_hidden=with_hidden)
        yield replace(part, rows=none[:0], last=None if part.last is None else part.last[:0])


@functools.cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """This forward pass compiled; sampling goes on to use the one that is not."""
    return torch.compile(forward, dynamic=True)


def _behind_prompts(
    trunk: Any, read: _Rows, prompts: _Rows, prompt_of: Tensor, limits: tuple[int, int] | None
) -> Iterator[Part]:
    """Read `prompts`, then the responses to them behind their keys and values.

    Args:
        trunk: the model.
        read: all rows.
        prompts: some of the distinct prompts.
        prompt_of: `[N]` which of them is a row's, −1 where it is none.
        limits: see `by_length`.
    """
    cache = DynamicCache(config=trunk.config)
    hidden = trunk(input_ids=prompts.prompts, past_key_values=cache, use_cache=True).last_hidden_state
    before = hidden[torch.arange(len(hidden), device=hidden.device), prompts.prompt_lengths - 1]
    theirs = (prompt_of >= 0).nonzero().squeeze(1)
    for some in by_length(read.response_lengths[theirs].cpu(), limits):
        rows = theirs[some.to(theirs.device)]
        prompt, lengths, width = prompt_of[rows], read.prompt_lengths[rows], int(read.response_lengths[rows].max())
        states = before[prompt].unsqueeze(1)  # [n, 1 + width, H]
        if width:
            behind = _behind(trunk, cache, prompt, lengths, read.responses[rows, :width])
            states = torch.cat([states, behind], dim=1)
        row, step = read.scored_cells(rows)
        last = states[torch.arange(len(rows), device=rows.device), read.response_lengths[rows]]
        yield Part(rows[row], step, states[row, step], rows, last)


def _behind(trunk: Any, cache: DynamicCache, prompt: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
    """Read `ids` `[n, t]` behind prompts, which lie in the cache from column 0 on.

    Each row gets its prompt so that it ends in the last column: some models count distances in columns, and nothing
    must be between a prompt and what follows.

    Args:
        trunk: the model.
        cache: of the prompts.
        prompt: `[n]` which of them is the row's.
        lengths: `[n]` of the rows' prompts.
        ids: what follows.

    Returns:
        Hidden states `[n, t, H]`.
    """
    longest, new = int(lengths.max()), ids.shape[1]
    held = DynamicCache(config=trunk.config)
    position = torch.arange(longest + new, device=ids.device) - longest + lengths.unsqueeze(1)  # negative: no prompt
    source = position[:, None, :longest, None].clamp(min=0)
    for layer, of_prompts in zip(held.layers, cache.layers, strict=True):
        keys, values = (x[:, :, :longest].index_select(0, prompt) for x in (of_prompts.keys, of_prompts.values))
        if int(lengths.min()) < longest:
            keys, values = (x.gather(2, source.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    arguments: dict[str, Any] = {"attention_mask": (position >= 0).long(), "past_key_values": held, "use_cache": True}
    if "position_ids" in inspect.signature(trunk.forward).parameters:
        arguments["position_ids"] = position[:, longest:]
    hidden: Tensor = trunk(input_ids=ids, **arguments).last_hidden_state
    return hidden


def token_parts(batch: Completions | PreferenceBatch, budget: int, share_prompts: bool) -> list[Tensor]:
    """Split a batch into parts of at most `budget` tokens, one row at least; rows of one prompt stay side by side.

    Args:
        batch: N rows, or pairs, both of whose completions count.
        budget: tokens of a part, without padding.
        share_prompts: a prompt counts once in a part.

    Returns:
        The numbers of each part's rows, `[k]` int64.
    """
    read = _Rows.of(batch.completions() if isinstance(batch, PreferenceBatch) else batch)
    of_row = read.distinct_prompts()[1][: len(batch)].cpu()
    tokens = read.response_lengths.view(-1, len(batch)).sum(0).tolist()
    numbers, lengths = of_row.tolist(), read.prompt_lengths.tolist()
    copies = 1 if share_prompts else len(read.prompts) // len(batch)
    parts: list[list[int]] = []
    used, before = 0, -1
    for row in of_row.argsort(stable=True).tolist():
        prompt = lengths[row] * copies
        shared = share_prompts and numbers[row] == before
        if parts and used + tokens[row] + (0 if shared else prompt) <= budget:
            parts[-1].append(row)
            used += tokens[row] + (0 if shared else prompt)
        else:
            parts.append([row])
            used = tokens[row] + prompt
        before = numbers[row]
    return [torch.tensor(part, device=read.prompts.device) for part in parts]

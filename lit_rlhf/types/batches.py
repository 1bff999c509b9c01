"""The batches that travel between the parts: plain frozen dataclasses, shapes in the field comments.

Letters: B prompts, G samples per prompt, N = B * G rows, P prompt width, T response width.
Prompts are left-padded, responses right-padded; `response_mask` is true on every sampled token, the
first EOS included, and false after it, on padding and on tokens that the policy did not sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from lit_rlhf.errors import InputError
from lit_rlhf.types.field_docs import with_fields

Row: TypeAlias = dict[str, Any]  # of a dataset, by column


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled. Every argument is passed on explicitly: no engine default ever applies.

    Args:
        max_new_tokens: longest completion, in tokens, EOS included.
        temperature: the sampling temperature; log-probs are scored at the same one. 0 means greedy.
        top_p: nucleus mass; 1 keeps the full distribution, as training rollouts should.
        top_k: number of most likely tokens kept; 0 keeps all.
        group_size: G, samples per prompt. An algorithm's own `group_size` replaces it.
        stop: extra strings that end a completion, each a single token of the tokenizer.
        max_staleness: k. With 0 a rollout is sampled by the weights that are then trained on it; with more, while the k
            rollouts before it are trained on, by the weights of before them (see `rollouts.ahead`).
        max_rows: most completions sampled at a time, which bounds the memory; others take the place of those that have
            ended. None: all at once. The completions are the same.

    Raises:
        InputError: a number that nothing can be sampled with.

    >>> SamplingConfig(max_new_tokens=256, temperature=0.7).group_size
    1
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    group_size: int = 1
    stop: Sequence[str] = ()
    max_staleness: int = 0
    max_rows: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be sampled with."""
        for name, ok, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more, and finite"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("group_size", self.group_size >= 1, "at least 1"),
            ("max_staleness", self.max_staleness >= 0, "0 (synchronous) or more"),
            ("stop", _are_texts(self.stop), "a list of texts"),
            ("max_rows", self.max_rows is None or self.max_rows >= 1, "at least 1, or null for all at once"),
        ):
            if not ok:
                raise InputError(f"sampling: {name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def truncates_distribution(self) -> bool:
        """Whether the sampled distribution differs from softmax(logits / temperature)."""
        return self.temperature == 0 or self.top_p < 1 or self.top_k > 0


def _are_texts(stop: Any) -> bool:
    return isinstance(stop, Sequence) and not isinstance(stop, str) and all(isinstance(text, str) for text in stop)


@dataclass(frozen=True)
class Rows:
    """Base of the batches: `len`, row indexing, `.to(device)`. Tensors of rank 0 are shared by all rows."""

    def _map_tensors(self, fn: Any) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: fn(v) for k, v in values.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy every tensor to `device`."""
        return self._map_tensors(lambda t: t.to(device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index: Tensor | slice) -> Self:
        """Select rows, by a slice, an index tensor or a boolean tensor `[N]`."""
        return self._map_tensors(lambda t: t[index] if t.ndim else t)


@with_fields
@dataclass(frozen=True)
class PromptBatch:
    """Prompts to sample for.

    `index` is each prompt's position in the endless prompt stream: it is the group id of the prompt's
    samples and, with the run's seed, decides their random numbers, whichever rank draws them.
    """

    prompt_ids: list[list[int]]  # B lists of token ids, unpadded
    columns: dict[str, list[Any]]  # the dataset's columns, B values each; "prompt" is the text
    index: list[int]  # B stream positions
    rows: Sequence[int] = ()  # B rows of the dataset, where they were drawn from one
    filler: bool = False  # there only to give every rank as many batches; counts for nothing

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return itself: there are no tensors. Lightning moves every batch."""
        return self


@with_fields
@dataclass(frozen=True)
class CompletionBatch(Rows):
    """Prompts with completions to imitate (SFT) or to score. The step counts are those of `Experience`."""

    prompt_ids: Tensor  # [N, P] int64, left-padded
    prompt_mask: Tensor  # [N, P] bool
    response_ids: Tensor  # [N, T] int64, right-padded
    response_mask: Tensor  # [N, T] bool, EOS included
    step_tokens: Tensor | None = None  # [] tokens of the optimiser step
    step_rows: Tensor | None = None  # [] non-empty rows of the optimiser step

    def without_tokens(self) -> CompletionBatch:
        """The same batch with empty completions: rows that count for nothing."""
        return replace(self, response_mask=torch.zeros_like(self.response_mask))


@with_fields
@dataclass(frozen=True)
class PreferenceBatch(Rows):
    """Pairs of completions of one prompt, one preferred to the other (DPO, reward models)."""

    prompt_ids: Tensor  # [N, P] int64, left-padded
    prompt_mask: Tensor  # [N, P] bool
    chosen_ids: Tensor  # [N, T] int64, right-padded
    chosen_mask: Tensor  # [N, T] bool, EOS included
    rejected_ids: Tensor  # [N, T] int64, right-padded; T is the same
    rejected_mask: Tensor  # [N, T] bool, EOS included
    ref_chosen: Tensor | None = None  # [N, T] log-probs under the reference, where they were computed beforehand
    ref_rejected: Tensor | None = None  # [N, T]
    margin: Tensor | None = None  # [N] by how much the chosen one is better
    step_tokens: Tensor | None = None  # []
    step_rows: Tensor | None = None  # [] pairs of the optimiser step

    @property
    def response_mask(self) -> Tensor:
        """`[N, T]` bool, the cells that either completion fills: what a step's counts are taken from."""
        return self.chosen_mask | self.rejected_mask

    def without_tokens(self) -> PreferenceBatch:
        """The same batch with empty completions: pairs that count for nothing."""
        nothing = {name: torch.zeros_like(getattr(self, name)) for name in ("chosen_mask", "rejected_mask")}
        return replace(self, **nothing)

    def completions(self) -> CompletionBatch:
        """The 2N completions as rows of one batch: all the chosen ones, then all the rejected ones."""
        return CompletionBatch(
            torch.cat([self.prompt_ids] * 2),
            torch.cat([self.prompt_mask] * 2),
            torch.cat([self.chosen_ids, self.rejected_ids]),
            torch.cat([self.chosen_mask, self.rejected_mask]),
        )


@with_fields
@dataclass(frozen=True, kw_only=True)
class Rollout(Rows):
    """Sampled completions, as an engine returns them."""

    prompt_ids: Tensor  # [N, P] int64, left-padded
    prompt_mask: Tensor  # [N, P] bool
    response_ids: Tensor  # [N, T] int64, right-padded
    response_mask: Tensor  # [N, T] bool
    behavior_logprobs: Tensor  # [N, T] float32, of the distribution sampled from; [N] where only their sum is known
    truncated: Tensor  # [N] bool, ended by max_new_tokens and not by EOS or a stop token
    group_ids: Tensor  # [N] int64, rows of one prompt share one id
    version: Tensor  # [N] int64, rollouts the sampling weights had been trained on

    @property
    def lengths(self) -> Tensor:
        """Sampled tokens per row, `[N]` int64."""
        return self.response_mask.sum(1)

    def spread(self, per_row: Tensor) -> Tensor:
        """Put a number per row `[N]` on each of the row's sampled tokens: `[N, T]`, zero elsewhere."""
        return torch.where(self.response_mask, per_row.unsqueeze(1), torch.zeros_like(per_row).unsqueeze(1))

    def trim(self) -> Self:
        """Drop leading prompt columns and trailing response columns that no row uses."""
        first = int(self.prompt_mask.any(0).float().argmax()) if self.prompt_mask.numel() else 0
        last = int(self.response_mask.any(0).nonzero().max()) + 1 if self.response_mask.any() else 1
        P, T = self.prompt_ids.shape[1], self.response_ids.shape[1]

        def cut(name: str, value: Tensor) -> Tensor:
            if value.ndim < 2 or name == "reward_parts":
                return value
            return value[:, first:P] if name.startswith("prompt_") else value[:, : min(last, T)]

        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: cut(k, v) for k, v in named.items() if isinstance(v, Tensor)})


@with_fields
@dataclass(frozen=True, kw_only=True)
class ScoredRollout(Rollout):
    """Completions with their rewards, and the log-probs that the update needs."""

    raw_rewards: Tensor  # [N] weighted sum of the reward functions; NaN: none applies
    reward_parts: Tensor  # [N, F] each reward function on its own; NaN: not applicable
    rewards: Tensor  # [N] or [N, T], after shaping
    old_logprobs: Tensor  # [N, T] under the policy at the start of the update phase
    unscored: Tensor | None = None  # [N] bool, rows whose `old_logprobs` are left to the update's own forward pass
    ref_logprobs: Tensor | None = None  # [N, T] under the reference
    values: Tensor | None = None  # [N, T] before emitting token t
    bootstrap: Tensor | None = None  # [N] value after the last token of a row that was cut off, 0 of a row that ended
    baseline: Tensor | None = None  # [N] reward of another completion of the same prompt (ReMax)


@with_fields
@dataclass(frozen=True, kw_only=True)
class Experience(ScoredRollout):
    """Rows to train on: a scored rollout with advantages.

    `step_tokens` and `step_rows` count the masked tokens and the non-empty rows of the whole optimiser
    step, over its micro-batches and ranks; every loss is normalised by them (see `RLHFModule.aggregate`), so
    that any split of a batch gives the same gradient. `None`: the batch counts as one `accumulate`-th of its step.
    """

    advantages: Tensor  # [N, T]
    returns: Tensor | None = None  # [N, T], for the value function
    staleness: Tensor | None = None  # [N] int64, rollouts between the weights that sampled and those trained on it
    step_tokens: Tensor | None = None  # [] tokens of the optimiser step
    step_rows: Tensor | None = None  # [] non-empty rows of the optimiser step

    def with_signal(self) -> Experience:
        """The rows with an advantage other than 0, or the first row where there is none.

        The rows left out have policy gradient exactly 0. They stay in the step's counts, so the gradient of
        what remains is the gradient of all.
        """
        signal = ((self.advantages != 0) & self.response_mask).any(1)
        first = torch.arange(len(signal), device=signal.device) == 0
        return self[signal | (first & ~signal.any())].trim()


def pad_left(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Left-pad token lists. Returns ids `[N, P]` int64 and mask `[N, P]` bool.

    >>> pad_left([[5], [6, 7]])[0].tolist()
    [[0, 5], [6, 7]]
    """
    ids, mask = pad_right([row[::-1] for row in rows], value)
    return ids.flip(1), mask.flip(1)


def pad_right(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Right-pad token lists. Returns ids `[N, T]` int64 and mask `[N, T]` bool.

    >>> ids, mask = pad_right([[5], [6, 7]])
    >>> ids.tolist(), mask.tolist()
    ([[5, 0], [6, 7]], [[True, False], [True, True]])
    """
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return ids, torch.arange(width) < lengths.unsqueeze(1)


AnyRollout = TypeVar("AnyRollout", bound=Rollout)


def concatenate(rollouts: Sequence[AnyRollout]) -> AnyRollout:
    """Stack rollouts of one type and of different widths: prompts are padded on the left, responses on the right.

    Optional fields are kept where all rollouts have them, and dropped where one does not; so are the counts of an
    optimiser step, which say nothing about the rows of several.
    """
    stacked: dict[str, Any] = {}
    for field in fields(rollouts[0]):
        values = [getattr(rollout, field.name) for rollout in rollouts]
        if any(value is None or value.ndim == 0 for value in values):
            stacked[field.name] = None
        elif values[0].ndim == 2 and field.name != "reward_parts":
            width, left = max(value.shape[1] for value in values), field.name.startswith("prompt_")
            stacked[field.name] = torch.cat([_widen(value, width, left) for value in values])
        else:
            stacked[field.name] = torch.cat(values)
    return replace(rollouts[0], **stacked)


def _widen(x: Tensor, width: int, left: bool) -> Tensor:
    extra = width - x.shape[1]
    return torch.nn.functional.pad(x, (extra, 0) if left else (0, extra))

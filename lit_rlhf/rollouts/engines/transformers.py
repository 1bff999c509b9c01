"""Sampling in process, from any Hugging Face causal language model: a loop over the model's own `forward`.

What `model.generate` does not do: a prompt is prefilled once however many samples it gets, rows that have
ended leave the batch, the cache is allocated once, log-probs are kept while sampling, and the random
numbers belong to the prompt and not to the batch (`lit_rlhf.rollouts.random`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lit_rlhf.errors import InputError
from lit_rlhf.models.modes import eval_mode
from lit_rlhf.rollouts.engines.draw import draw, for_sampling
from lit_rlhf.rollouts.engines.forward import Forward, SharedForward
from lit_rlhf.rollouts.engines.prompts import checked_prompts, seed_per_prompt
from lit_rlhf.rollouts.engines.shared import NotShareableError
from lit_rlhf.rollouts.random import uniforms
from lit_rlhf.types import Rollout, SamplingConfig

_KEEP_FRACTION = 0.75  # finished rows are dropped once fewer than this share of the batch is alive
_STEPS_BETWEEN_CHECKS = {"cpu": 1}  # elsewhere 8: counting the living waits for the device


class TransformersEngine:
    """A `RolloutEngine` that samples from the very module that trains.

    Args:
        eos_token_ids: tokens that end a completion; they belong to it.
        pad_token_id: fills the unused cells. It may be one of the EOS tokens.
        stop_token_ids: further tokens that end a completion.
        share_prompts: keep a prompt's keys and values once for all its samples and attend to them together, where
            the model's attention allows it. Otherwise every row has a cache of its own.
        preallocate: allocate that cache once per call instead of growing it at every token.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        stop_token_ids: Sequence[int] = (),
        share_prompts: bool = True,
        preallocate: bool = True,
    ) -> None:
        self.end_token_ids = sorted({*eos_token_ids, *stop_token_ids})
        self.pad_token_id = pad_token_id
        self.share_prompts, self.preallocate = share_prompts, preallocate
        self._not_shared: frozenset[type] = frozenset()
        self.model: Any = None
        self.version = 0

    def update_weights(self, module: nn.Module, version: int) -> None:
        """Sample from `module`, a Hugging Face causal LM, from now on. It is referred to, not copied."""
        self.model, self.version = module, version

    def clone(self) -> Self:
        """See `ClonableEngine.clone`."""
        clone = copy.copy(self)
        clone.model = None
        return clone

    @torch.no_grad()  # not inference_mode: the tensors take part in autograd later
    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int | Sequence[int]
    ) -> Rollout:
        """See `RolloutEngine.generate`. The tensors are on the model's device.

        Non-finite logits give non-finite log-probs and no error: where ranks agree on skipping a step is
        the trainer's business.

        Raises:
            InputError: `update_weights` was not called before.
        """
        if self.model is None:
            raise InputError("the engine has no weights to sample from: call update_weights(model, version) first")
        G, device = sampling.group_size, next(self.model.parameters()).device
        padded = checked_prompts(self.model, prompt_ids, sampling.max_new_tokens, self.pad_token_id)
        ids, mask = (x.to(device) for x in padded)
        ends = torch.tensor(self.end_token_ids, dtype=torch.long, device=device)
        uniform = uniforms(seed_per_prompt(seed, len(ids)), G, sampling.max_new_tokens)
        with eval_mode(self.model):
            response, response_mask, logprobs = self._sampled(prompt_ids, sampling, for_sampling(uniform, device), ends)
        last = response.gather(1, response_mask.sum(1, keepdim=True) - 1).squeeze(1)
        return Rollout(
            prompt_ids=ids.repeat_interleave(G, 0),
            prompt_mask=mask.repeat_interleave(G, 0),
            response_ids=response,
            response_mask=response_mask,
            behavior_logprobs=logprobs,
            truncated=~torch.isin(last, ends),
            group_ids=torch.arange(len(ids), device=device).repeat_interleave(G),
            version=torch.full_like(last, self.version),
        )

    def _sampled(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, uniform: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The quickest way that is right for the model. A model says at its first token whether it can share."""
        steps = sampling.max_new_tokens
        if self.share_prompts and type(self.model) not in self._not_shared:
            try:
                return self._sample(SharedForward(self.model, prompt_ids, steps), sampling, uniform, ends)
            except NotShareableError:
                self._not_shared |= {type(self.model)}
        return self._sample(Forward(self.model, prompt_ids, steps, self.preallocate), sampling, uniform, ends)

    def _sample(
        self, forward: Forward, sampling: SamplingConfig, uniform: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample `[N, T]` ids, mask and log-probs, T the longest response. `uniform` is `[N, max_new_tokens]`."""
        (N, steps), G = uniform.shape, sampling.group_size
        check_every = _STEPS_BETWEEN_CHECKS.get(uniform.device.type, 8)
        sheet = _Sheet(uniform, sampling, ends)
        rows, waiting, iteration, since = sheet.rows(0, 0), 0, 0, 0
        while True:  # each time round is one forward pass: where it is a collective, ranks stay in step
            more = _admissible(N - waiting, len(rows), min(sampling.max_rows or N, N), G, forward.joins)
            if more:
                prompts = Counter(row // G for row in range(waiting, waiting + more))
                logits = forward.admit(list(prompts), list(prompts.values()))
                rows = rows.joined(sheet.draw(sheet.rows(waiting, waiting + more), logits))
                waiting, since = waiting + more, 0
            else:
                rows = sheet.draw(rows, forward.decode(rows.token))
            iteration, since = iteration + 1, since + 1
            if iteration % check_every and since != steps:  # then the rows that were admitted last have ended
                continue
            alive = rows.cell < rows.last
            count = int(alive.sum())
            if not self._any_alive(count + N - waiting):
                break
            if count < _KEEP_FRACTION * len(rows) and (count or waiting < N):
                kept = alive.nonzero().squeeze(1)
                rows = rows.select(kept)
                forward.select(kept)
        return sheet.filled(self.pad_token_id)

    def _any_alive(self, count: int) -> bool:
        """Whether to go on. Where a forward is a collective (FSDP), this is the place to ask every rank."""
        return count > 0


def _admissible(waiting: int, held: int, limit: int, group_size: int, joins: bool) -> int:
    """How many of the `waiting` rows to admit beside the `held` ones: whole groups, where a group fits in `limit`."""
    if held and not joins:
        return 0
    room = limit - held
    return min(waiting, room - room % group_size if limit >= group_size else room)


@dataclass(frozen=True)
class _Rows:
    """The rows in the batch, n of them."""

    cell: Tensor  # [n] where the row's next token belongs, in the flattened sheet
    last: Tensor  # [n] the row's spare cell: reached when it has ended
    token: Tensor  # [n] the token drawn last

    def __len__(self) -> int:
        return len(self.cell)

    def select(self, kept: Tensor) -> _Rows:
        return _Rows(self.cell[kept], self.last[kept], self.token[kept])

    def joined(self, new: _Rows) -> _Rows:
        return _Rows(*(torch.cat([getattr(self, f.name), getattr(new, f.name)]) for f in fields(_Rows)))


class _Sheet:
    """What is sampled, by row and step, and the numbers to sample it with.

    Every row has a spare cell at its end, which takes what is drawn for it once it has ended. So a step writes all
    rows, whatever state each is in, and no state is read back from the device.
    """

    def __init__(self, uniform: Tensor, sampling: SamplingConfig, ends: Tensor) -> None:
        (self.N, steps), self.sampling, self.ends = uniform.shape, sampling, ends
        self.width = steps + 1
        self.uniform = nn.functional.pad(uniform, (0, 1)).flatten()
        self.token = torch.full_like(self.uniform, -1, dtype=torch.long)
        self.logprob = torch.zeros_like(self.uniform, dtype=torch.float32)

    def rows(self, first: int, end: int) -> _Rows:
        """Rows that have no token yet."""
        cell = torch.arange(first, end, device=self.ends.device) * self.width
        return _Rows(cell, cell + (self.width - 1), cell)

    def draw(self, rows: _Rows, logits: Tensor) -> _Rows:
        """Draw and note down the next token of each row."""
        token, logprob = draw(logits, self.uniform[rows.cell], self.sampling)
        self.token[rows.cell], self.logprob[rows.cell] = token, logprob
        following = torch.where(torch.isin(token, self.ends), rows.last, torch.minimum(rows.cell + 1, rows.last))
        return _Rows(following, rows.last, token)

    def filled(self, pad: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and log-probs `[N, T]`, T the longest response."""
        token, logprob = (x.view(self.N, self.width)[:, :-1] for x in (self.token, self.logprob))
        mask = token >= 0
        longest = int(mask.sum(1).max())
        return token.masked_fill(~mask, pad)[:, :longest], mask[:, :longest], logprob[:, :longest].contiguous()

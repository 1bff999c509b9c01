"""Sampling in process, from any Hugging Face causal language model: a loop over the model's own `forward`.

What `model.generate` does not do: a prompt is prefilled once however many samples it gets, rows that have
ended leave the batch, the cache is allocated once, log-probs are kept while sampling, and the random
numbers belong to the prompt and not to the batch (`lit_rlhf.rollouts.random`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import max_positions
from lit_rlhf.models.modes import eval_mode
from lit_rlhf.rollouts.engines.cache import new_cache
from lit_rlhf.rollouts.random import mix_seed, uniforms
from lit_rlhf.types import Rollout, SamplingConfig, pad_left

_KEEP_FRACTION = 0.75  # finished rows are dropped once fewer than this share of the batch is alive
_STEPS_BETWEEN_CHECKS = {"cpu": 1}  # elsewhere 8: counting the living waits for the device


class TransformersEngine:
    """A `RolloutEngine` that samples from the very module that trains.

    Args:
        eos_token_ids: tokens that end a completion; they belong to it.
        pad_token_id: fills the unused cells. It may be one of the EOS tokens.
        stop_token_ids: further tokens that end a completion.
        preallocate: allocate the cache once per call instead of growing it at every token.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        stop_token_ids: Sequence[int] = (),
        preallocate: bool = True,
    ) -> None:
        self.end_token_ids = sorted({*eos_token_ids, *stop_token_ids})
        self.pad_token_id = pad_token_id
        self.preallocate = preallocate
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
        """
        if self.model is None:
            raise InputError("the engine has no weights to sample from: call update_weights(model, version) first")
        G, device = sampling.group_size, next(self.model.parameters()).device
        ids, mask = (x.to(device) for x in self._checked(prompt_ids, sampling.max_new_tokens))
        ends = torch.tensor(self.end_token_ids, dtype=torch.long, device=device)
        uniform = uniforms(_seed_per_prompt(seed, len(ids)), G, sampling.max_new_tokens)
        with eval_mode(self.model):
            forward = _Forward(self.model, ids, mask, sampling.max_new_tokens, self.preallocate)
            response, response_mask, logprobs = self._sample(forward, sampling, _for_sampling(uniform, device), ends)
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

    def _checked(self, prompt_ids: Sequence[Sequence[int]], new_tokens: int) -> tuple[Tensor, Tensor]:
        """Left-padded prompts `[B, P]` and their mask, or an `InputError`."""
        if len(prompt_ids) == 0:
            raise InputError("there are no prompts to sample for: give at least one")
        if empty := [i for i, prompt in enumerate(prompt_ids) if len(prompt) == 0]:
            raise InputError(f"prompt {empty[0]} is empty: every prompt needs at least one token")
        ids, mask = pad_left(prompt_ids, self.pad_token_id)
        longest, vocabulary = ids.shape[1], self.model.get_input_embeddings().num_embeddings
        limit = max_positions(self.model)
        if limit is not None and longest + new_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens with max_new_tokens={new_tokens} exceeds the model's limit of {limit} "
                "positions: shorten the prompt or lower max_new_tokens"
            )
        outside = ((ids < 0) | (ids >= vocabulary)).nonzero().tolist()
        if outside:
            row, column = outside[0]
            where = f"prompt {row}" if mask[row, column] else "the padding (pad_token_id)"
            raise InputError(
                f"token id {int(ids[row, column])} in {where} is outside the model's vocabulary of {vocabulary}: "
                "use the model's own tokenizer, or resize the model's embeddings"
            )
        return ids, mask

    def _sample(
        self, forward: _Forward, sampling: SamplingConfig, uniform: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample `[N, T]` ids, mask and log-probs, T the longest response. `uniform` is `[N, max_new_tokens]`."""
        (N, steps), device = uniform.shape, uniform.device
        check_every = _STEPS_BETWEEN_CHECKS.get(device.type, 8)
        logits = forward.prefill(sampling.group_size)
        live = _Live(torch.arange(N, device=device), torch.ones(N, dtype=torch.bool, device=device), uniform)
        response = torch.full((N, steps), self.pad_token_id, device=device)
        response_mask = torch.zeros((N, steps), dtype=torch.bool, device=device)
        logprobs = torch.zeros((N, steps), device=device)
        for step in range(steps):
            token, logprob = _draw(logits, live.uniform[:, step], sampling)
            response[live.row, step] = torch.where(live.alive, token, self.pad_token_id)
            response_mask[live.row, step] = live.alive
            logprobs[live.row, step] = torch.where(live.alive, logprob, 0.0)
            live.alive = live.alive & ~torch.isin(token, ends)
            if step + 1 == steps:
                break
            if (step + 1) % check_every == 0:
                count = int(live.alive.sum())
                if not self._any_alive(count):
                    break
                if 0 < count < _KEEP_FRACTION * len(live.row):
                    kept = live.alive.nonzero().squeeze(1)
                    token, live = token[kept], live.select(kept)
                    forward.select(kept)
            logits = forward.decode(token)
        longest = int(response_mask.sum(1).max())
        return response[:, :longest], response_mask[:, :longest], logprobs[:, :longest]

    def _any_alive(self, count: int) -> bool:
        """Whether to go on. Where a forward is a collective (FSDP), this is the place to ask every rank."""
        return count > 0


@dataclass
class _Live:
    """The rows still in the batch, n of them."""

    row: Tensor  # [n] where the row belongs in the rollout
    alive: Tensor  # [n] bool, not ended yet
    uniform: Tensor  # [n, max_new_tokens]

    def select(self, kept: Tensor) -> _Live:
        return _Live(self.row[kept], self.alive[kept], self.uniform[kept])


class _Forward:
    """The model with its cache, mask and positions: tokens in, next-token logits `[n, V]` out."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, steps: int, preallocate: bool) -> None:
        self.model, self.ids = model, ids
        self.length = ids.shape[1]  # columns in the cache, padding included
        self.attention = torch.cat([mask.long(), mask.new_ones((len(ids), steps), dtype=torch.long)], 1)
        self.position = mask.sum(1, keepdim=True)  # [n, 1] of the next token
        bare = getattr(model, "_orig_mod", model)  # of torch.compile
        base = getattr(bare, "get_base_model", lambda: bare)()  # of PEFT
        named = inspect.signature(base.forward).parameters
        if "past_key_values" not in named:  # its **kwargs would swallow the cache: every token sampled from one alone
            raise InputError(
                f"{type(base).__name__} takes no past_key_values, so that it cannot be sampled from here; use a model "
                "with a key-value cache, or give the algorithm an engine of your own"
            )
        self.cache = new_cache(model.config, capacity=self.length + steps - 1, preallocate=preallocate)
        self.takes_position, self.takes_logits_to_keep = "position_ids" in named, "logits_to_keep" in named

    def prefill(self, repeats: int) -> Tensor:
        """Run every prompt once; the rows are then repeated `repeats` times, prompt by prompt."""
        positions = (self.attention[:, : self.length].cumsum(1) - 1).clamp(min=0)
        logits = self._run(self.ids, positions)
        if repeats == 1:
            return logits
        rows = torch.arange(len(self.ids), device=logits.device).repeat_interleave(repeats)
        self.select(rows)
        return logits[rows]

    def decode(self, token: Tensor) -> Tensor:
        """Append one token per row, `[n]`."""
        self.length += 1
        logits = self._run(token.unsqueeze(1), self.position)
        self.position = self.position + 1
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        self.cache.reorder_cache(rows)  # unlike batch_select_indices, every kind of layer has it
        self.attention, self.position = self.attention[rows], self.position[rows]

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        extra: dict[str, Any] = {"position_ids": positions} if self.takes_position else {}
        if self.takes_logits_to_keep:
            extra["logits_to_keep"] = 1
        attention = self.attention[:, : self.length]
        out = self.model(input_ids=ids, attention_mask=attention, past_key_values=self.cache, use_cache=True, **extra)
        logits: Tensor = out.logits[:, -1]
        return logits


def _draw(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw from `[n, V]` logits by the inverse distribution function. Returns tokens and log-probs, `[n]`."""
    logits = logits.float()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    logprobs = _truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=uniform.dtype)
    # The first entry above the target, so that a token of probability zero is never drawn. The clamp matters for NaN.
    token = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)
    token = token.clamp(max=logits.shape[1] - 1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)


def _truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Forbid all but the `top_k` most likely tokens, then all but the fewest that hold `top_p` of the mass."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        probs = ranked.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return logits


def _for_sampling(uniform: Tensor, device: torch.device) -> Tensor:
    """Move to the device, as the precision to sum probabilities in; times any total stays below the total."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    return uniform.to(dtype).clamp(max=1 - torch.finfo(dtype).eps).to(device)


def _seed_per_prompt(seed: int | Sequence[int], prompts: int) -> list[int]:
    if isinstance(seed, int):
        return [mix_seed(seed, i) for i in range(prompts)]
    if len(seed) != prompts:
        raise InputError(f"got {len(seed)} seeds for {prompts} prompts: give one per prompt, or one integer")
    return list(seed)

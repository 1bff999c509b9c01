"""The one scoring path: per-token log-probs, entropy, KL and values of completions under any causal language model.

Every algorithm is a small function of these numbers, so padding, alignment, temperature and the choice of
logits that are computed at all are decided here and nowhere else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_rlhf.functional import exact_kl, linear_logprobs, token_entropy, token_logprobs
from lit_rlhf.functional.linear_logprobs import TILE
from lit_rlhf.models.adapters import without_adapters
from lit_rlhf.models.forward import Completions, Shortcuts, forward_parts
from lit_rlhf.models.output_layer import continues_from_cache, output_layer
from lit_rlhf.types.field_docs import with_fields


@with_fields
class Scores(NamedTuple):  # whose tensors a sharded model's hooks find
    """What a forward pass says about the completions; zero where `response_mask` is false."""

    logprobs: Tensor  # [N, T] float32, log pi(o_t | prompt, o_<t) at the sampling temperature
    entropy: Tensor | None = None  # [N, T] nats, of the whole distribution at the same positions
    kl: Tensor | None = None  # [N, T] nats, exact KL(policy, reference) at the same positions
    values: Tensor | None = None  # [N, T] V before emitting token t


@with_fields
class Values(NamedTuple):
    """What a scalar head says about the completions."""

    values: Tensor  # [N, T] before emitting token t; zero where `response_mask` is false
    last: Tensor  # [N] after the last token: what a completion that was cut off would go on to earn, or its reward


def score(
    model: nn.Module,
    rows: Completions,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = True,
    reference: nn.Module | None = None,
    head: nn.Module | None = None,
    shortcuts: Shortcuts | None = None,
) -> Scores:
    """Teacher-forced log-probs of the rows' responses given their prompts.

    Logits are computed only at the positions that predict a masked-in token (ALGORITHMS: those at position P+t-1
    predict response token t), and padding takes no part in the forward pass, so that it changes nothing.

    Args:
        model: a Hugging Face causal language model.
        rows: prompts `[N, P]`, left-padded, and responses `[N, T]`, right-padded; what stands in padded cells does
            not matter. False cells of `response_mask` before a row's last true one are tokens that the policy
            read but did not sample (a tool's output): they are attended to and not scored.
        temperature: the sampling temperature that the logits are divided by.
        entropy: also return the entropy, in nats.
        entropy_gradient: with its gradient; without, nothing of it is kept for the backward pass.
        reference: also return the exact KL to this model without its adapters, if it has any, summed over the
            vocabulary.
        head: also return the values of this head on the model's last hidden states.
        shortcuts: of the computation; all by default.
    """
    shortcuts = shortcuts or Shortcuts()
    layer, trunk = _taken_apart(model)
    found: dict[str, list[Tensor]] = {}
    cells: list[tuple[Tensor, Tensor]] = []
    if reference is not None:
        ref_layer, ref_trunk = _taken_apart(reference)
        shared = shortcuts.share_prompts and continues_from_cache(trunk) and continues_from_cache(ref_trunk)
        shortcuts = replace(shortcuts, share_prompts=shared)  # so that both run in the same parts
        ref_parts = forward_parts(ref_trunk, rows, shortcuts)
    for part in forward_parts(trunk, rows, shortcuts, with_hidden=head is not None and layer is None):
        cells.append((part.row, part.step))
        ids = rows.response_ids[part.row, part.step]
        logprobs, entropies = _logprobs(layer, part.states, ids, temperature, entropy, shortcuts)
        said = {"logprobs": logprobs}
        if entropies is not None:
            said["entropy"] = entropies if entropy_gradient else entropies.detach()
        if reference is not None:
            with torch.no_grad(), without_adapters(reference):
                ref_states = next(ref_parts).states
            said["kl"] = _kl(layer, part.states, ref_layer, ref_states, temperature)
        if head is not None:
            said["values"] = head(part.states if part.hidden is None else part.hidden)
        for name, numbers in said.items():
            found.setdefault(name, []).append(numbers)
    names = ["logprobs"] + ["entropy"] * entropy + ["kl"] * (reference is not None) + ["values"] * (head is not None)
    return Scores(**{name: _scatter(found.get(name, []), cells, rows) for name in names})


def score_values(trunk: nn.Module, head: nn.Module, rows: Completions, shortcuts: Shortcuts | None = None) -> Values:
    """Values of the rows' responses: the head read at the same positions as the logits.

    Args:
        trunk: a Hugging Face model without a language-modelling head.
        head: hidden states `[..., H]` to numbers `[...]`.
        rows: see `score`.
        shortcuts: see `score`.
    """
    values, cells, last = [], [], torch.zeros(len(rows), device=rows.response_ids.device)
    for part in forward_parts(trunk, rows, shortcuts or Shortcuts()):
        values.append(head(part.states))
        cells.append((part.row, part.step))
        of_part = head(part.last)
        last = last.to(of_part.dtype).index_put((part.rows,), of_part)
    return Values(_scatter(values, cells, rows), last)


def _taken_apart(model: Any) -> tuple[nn.Linear | None, nn.Module]:
    """The output layer and the trunk; of a model that is more than these two, None and the whole model."""
    layer = output_layer(model)
    return layer, model if layer is None else model.base_model


def _logprobs(
    layer: nn.Linear | None, states: Tensor, ids: Tensor, temperature: float, entropy: bool, shortcuts: Shortcuts
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies `[K]` of tokens from the states `[K, C]` before them, logits where there is no layer."""
    if layer is not None and shortcuts.chunk_vocabulary:
        return linear_logprobs(states, layer.weight, ids, layer.bias, temperature, entropy)
    logits = states if layer is None else layer(states)
    return token_logprobs(logits, ids, temperature), token_entropy(logits, temperature) if entropy else None


def _kl(
    layer: nn.Linear | None, states: Tensor, ref_layer: nn.Linear | None, ref_states: Tensor, temperature: float
) -> Tensor:
    """Exact KL to the reference `[K]`; where there are output layers, a few rows at a time and once more backward."""

    def of_chunk(states: Tensor, ref_states: Tensor) -> Tensor:
        logits = states if layer is None else layer(states)
        return exact_kl(logits, ref_states if ref_layer is None else ref_layer(ref_states), temperature)

    if layer is None:
        return of_chunk(states, ref_states)
    rows = max(TILE[0] * TILE[1] // layer.out_features, 1)
    chunks = zip(torch.split(states, rows), torch.split(ref_states, rows), strict=True)
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def _scatter(numbers: list[Tensor], cells: list[tuple[Tensor, Tensor]], rows: Completions) -> Tensor:
    """Put each part's numbers `[K]` on their cells, rows and steps: `[N, T]`, differentiable, 0 elsewhere."""
    if not cells:
        return torch.zeros(rows.response_mask.shape, device=rows.response_mask.device)
    flat = torch.cat(numbers)
    row, step = (torch.cat(indices) for indices in zip(*cells, strict=True))
    return flat.new_zeros(rows.response_mask.shape).index_put((row, step), flat)

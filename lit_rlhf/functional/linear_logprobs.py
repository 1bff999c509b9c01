"""Log-probability and entropy of tokens from hidden states, without ever holding the logits of all of them.

    z = W h + b,    u = z/τ,    lp = u_y − log Σ_v exp(u_v),    H = −Σ_v p_v log p_v,    p = softmax(u)

For K tokens and a vocabulary of V the logits are K·V numbers, often more than the rest of a training step. Here they
are computed a tile of tokens and vocabulary at a time, with running sums (Milakov and Gimelshein, arXiv 1805.02867),
and once more in the backward pass, where the gradient follows from p alone:

    d lp/du = onehot(y) − p,        dH/du = −p·(log p + H)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.functional.logprobs import check_temperature

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Int

TILE = (512, 4096)  # tokens and vocabulary whose logits are held at one time
_FORBIDDEN = -1e4  # stands for a logit of −inf, whose product with a probability of 0 would be no number


def linear_logprobs(
    hidden: Float[Tensor, "K H"],
    weight: Float[Tensor, "V H"],
    ids: Int[Tensor, " K"],
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    tile: tuple[int, int] = TILE,
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"] | None]:
    """Log-probabilities of `ids` under softmax((W h + b)/τ), and the entropy if asked for.

    In tiles of tokens and vocabulary, with running sums (Milakov and Gimelshein, arXiv 1805.02867): see the module.

    The same numbers and gradients as `token_logprobs` and `token_entropy` of `F.linear(hidden, weight, bias)`. The
    products run in the dtype of `weight` (under autocast in its dtype), all else in float32; float64 stays float64.

    Args:
        hidden: `[K, H]`, states that predict the tokens.
        weight: `[V, H]`, the output embeddings.
        ids: `[K]`, the tokens.
        bias: `[V]`, if the output layer has one.
        temperature: τ, the sampling temperature.
        entropy: also return the entropy, in nats.
        tile: tokens and vocabulary whose logits are held at one time.

    >>> linear_logprobs(torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 2]))[0]
    tensor([-0.4076, -0.5514])
    """
    check_temperature(temperature)
    found: tuple[Tensor, Tensor] = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, ids, temperature, entropy, tile
    )
    return found[0], found[1] if entropy else None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        entropy: bool,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        layer = _OutputLayer(hidden, weight, bias, temperature, tile)
        logprobs, totals, entropies = hidden.new_zeros((3, len(ids)), dtype=layer.sums)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in layer.tokens(hidden):
                sums = _RunningSums(ids[rows], entropy)
                for columns, u in layer.logits(hidden[rows]):
                    sums.add(u, columns.start, layer.spare(u))
                logprobs[rows], totals[rows] = sums.logprobs, sums.highest + sums.total.log()
                if entropy:
                    entropies[rows] = sums.total.log() - sums.weighted / sums.total
        ctx.save_for_backward(hidden, weight, bias, ids, totals, entropies)
        ctx.set_materialize_grads(False)  # None for what the loss does not use
        ctx.settings = temperature, tile, layer.dtype
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, totals, entropies = ctx.saved_tensors
        layer = _OutputLayer(hidden, weight, bias, *ctx.settings)
        of_hidden, of_weight, of_bias = (
            x.new_zeros(x.shape, dtype=layer.sums) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        of_logprobs = torch.zeros_like(totals) if of_logprobs is None else of_logprobs
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in layer.tokens(hidden):
                states = hidden[rows].to(layer.dtype)
                g = of_logprobs[rows].unsqueeze(1) / layer.temperature
                for columns, u in layer.logits(states):
                    log_p = u.sub_(totals[rows].unsqueeze(1))
                    p = torch.exp(log_p, out=layer.spare(u))
                    if of_entropies is None:
                        of_u = p.mul_(-g)
                    else:
                        surprise = log_p.clamp_(min=_FORBIDDEN).add_(entropies[rows].unsqueeze(1))
                        of_u = p.mul_(surprise.mul_(of_entropies[rows].unsqueeze(1) / -layer.temperature).sub_(g))
                    column, inside = _within(ids[rows], columns.start, u.shape[1])
                    of_u.scatter_add_(1, column, g * inside)
                    if of_bias is not None:
                        of_bias[columns] += of_u.sum(0)
                    of_u = of_u.to(layer.dtype)
                    if of_hidden is not None:
                        of_hidden[rows] += of_u @ weight[columns].to(layer.dtype)
                    if of_weight is not None:
                        of_weight[columns] += of_u.T @ states
        found = zip((of_hidden, of_weight, of_bias), (hidden, weight, bias), strict=True)
        return (*(None if x is None else x.to(like.dtype) for x, like in found), None, None, None, None)


class _RunningSums:
    """Over the vocabulary so far, for each token: max u, Σ exp(u − max), Σ exp(u − max)·(u − max), and u_y − max."""

    def __init__(self, ids: Tensor, entropy: bool) -> None:
        self.ids, self.entropy, self.first = ids, entropy, True
        self.highest: Tensor
        self.total: Tensor
        self.weighted: Tensor
        self.chosen: Tensor

    def add(self, u: Tensor, start: int, scratch: Tensor) -> None:
        """Take in the tile `u` `[tokens, vocabulary]` from the entry `start` on, and overwrite it."""
        column, inside = _within(self.ids, start, u.shape[1])
        chosen = torch.where(inside, u.gather(1, column), 0.0).squeeze(1)
        highest = u.amax(1).clamp(min=torch.finfo(u.dtype).min)  # of tokens that are all forbidden
        highest = highest if self.first else torch.maximum(self.highest, highest)
        u.sub_(highest.unsqueeze(1))
        total = torch.exp(u, out=scratch).sum(1)
        weighted = torch.linalg.vecdot(scratch, u.clamp_(min=_FORBIDDEN)) if self.entropy else total
        if self.first:
            self.chosen, self.total, self.weighted = chosen, total, weighted
        else:
            shift = self.highest - highest
            scale = shift.exp()
            self.weighted = scale * (self.weighted + self.total * shift) + weighted
            self.total, self.chosen = scale * self.total + total, self.chosen + chosen
        self.highest, self.first = highest, False

    @property
    def logprobs(self) -> Tensor:
        return (self.chosen - self.highest) - self.total.log()


def _within(ids: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each token's column `[K, 1]` in the tile that begins at `start`, and whether it is in there."""
    column = (ids - start).unsqueeze(1)
    inside = (column >= 0) & (column < width)
    return column.clamp(0, width - 1), inside


class _OutputLayer:
    """The scaled logits of one tile at a time, in two buffers that all tiles share.

    The weights are cast tile by tile: under autocast a copy of them all would be as large as what is saved.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        tile: tuple[int, int],
        dtype: torch.dtype | None = None,
    ) -> None:
        device = hidden.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        self.dtype = dtype or cast  # of the products
        self.sums = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.weight, self.bias, self.temperature, self.tile = weight, bias, temperature, tile
        self._buffers: tuple[Tensor, Tensor] | None = None

    def tokens(self, hidden: Tensor) -> Iterator[slice]:
        """The tokens, tile by tile."""
        for start in range(0, len(hidden), self.tile[0]):
            yield slice(start, min(start + self.tile[0], len(hidden)))

    def logits(self, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Which part of the vocabulary, and its u `[tokens, vocabulary]`, which the next tile overwrites."""
        states = states.to(self.dtype)
        for start in range(0, len(self.weight), self.tile[1]):
            columns = slice(start, min(start + self.tile[1], len(self.weight)))
            u = self._buffer(0, len(states), columns.stop - start)
            weight = self.weight[columns].to(self.dtype)
            if self.dtype == self.sums:
                torch.mm(states, weight.T, out=u)
            else:
                u.copy_(states @ weight.T)
            if self.bias is not None:
                u += self.bias[columns].to(self.sums)
            yield columns, u if self.temperature == 1 else u.div_(self.temperature)

    def spare(self, u: Tensor) -> Tensor:
        """The other buffer, in the shape of `u`."""
        return self._buffer(1, *u.shape)

    def _buffer(self, which: int, rows: int, columns: int) -> Tensor:
        if self._buffers is None:
            size = rows * min(self.tile[1], len(self.weight))
            self._buffers = tuple(self.weight.new_empty(size, dtype=self.sums) for _ in range(2))  # type: ignore[assignment]
        assert self._buffers is not None
        return self._buffers[which][: rows * columns].view(rows, columns)

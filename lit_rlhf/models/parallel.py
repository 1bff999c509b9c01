"""Sharded models: a rank holds its share of the weights, and a layer whole for as long as it computes with it.

    FSDP2: fully_shard(each decoder layer); then what is left: embeddings, norm, output layer
    DeepSpeed's ZeRO-3: every weight, by DeepSpeed itself

Forward and backward passes are collectives then: ranks run as many of them, in the same order. Sampling is none. It
runs in a plain copy of the policy whose weights are gathered for the while, at the speed of a whole model, and ranks
may sample different numbers of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from lit_rlhf.models.wrapper import PolicyReferenceValue

_PASSES = ("score", "score_reference", "score_values")  # of `PolicyReferenceValue`: its forward passes


def shard(models: PolicyReferenceValue, mesh: DeviceMesh) -> None:
    """Shard policy, reference and value function over the ranks of `mesh`, in place.

    Weights that two layers share stay one: all that is in no decoder layer is one unit, which is gathered for a pass.

    Args:
        models: whole, and the same on every rank.
        mesh: of one dimension, all ranks.
    """
    if models.value_trunk is not None:
        _hold_own_weights(models.value_trunk, models.policy)
    for model in (models.policy, models.reference, models.value_trunk):
        if model is not None:
            _shard_layers(model, mesh)
    for part in (models.value_trunk, models.value_head):  # these are called as modules
        if part is not None:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(models, mesh=mesh, reshard_after_forward=True)
    for name in _PASSES:
        register_fsdp_forward_method(models, name)


def shard_frozen(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model by itself, one that is only called, such as a reward model."""
    _shard_layers(model, mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether a pass of the model is a collective."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or in_zero3(model)


def in_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed holds the weights, which are empty outside of the forward pass of the module they belong to."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def whole(x: Tensor) -> Tensor:
    """The tensor of any shape of which `x` is a shard, or `x`. Every rank has to call it."""
    if hasattr(x, "ds_id"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([x]):
            return x.detach().clone()
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This rank's shard of `x`, of any shape, or `x`."""
    return x.to_local() if isinstance(x, DTensor) else x


class Blank:
    """A plain copy of a module that has weights only while they are gathered.

    Args:
        module: before it is sharded.
    """

    def __init__(self, module: nn.Module) -> None:
        empty: dict[int, Any] = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in module.parameters()}
        self.module: Any = copy.deepcopy(module, empty)

    @contextmanager
    def filled(self, sharded: nn.Module, device: str | None = None, keep: bool = True) -> Iterator[nn.Module]:
        """Inside, the copy has the weights of `sharded`. Every rank has to enter.

        Args:
            sharded: the module that this is a copy of.
            device: where to hold the weights; by default where the shards are.
            keep: whether this rank is to have them.
        """
        plain = [*self.module.parameters(), *self.module.buffers()]
        try:
            for mine, theirs in zip(plain, [*sharded.parameters(), *sharded.buffers()], strict=True):
                found = whole(theirs).detach()
                if keep:
                    mine.data = found if device is None else found.to(device)
                del found
            yield self.module
        finally:
            for parameter in self.module.parameters():
                parameter.data = parameter.new_empty(0)


def _shard_layers(model: Any, mesh: DeviceMesh) -> None:
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in reversed([*model.modules()]):  # from the inside out
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _hold_own_weights(model: nn.Module, other: nn.Module) -> None:
    """Copy the weights that `model` shares with `other`: a shard belongs to one layer."""
    shared = {id(p) for p in other.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in shared:
                own = copies.setdefault(id(p), nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
                setattr(module, name, own)

"""Lightning's strategies as `trainer=ddp|fsdp2|deepspeed` builds them: no collective waits for ever."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch import strategies as of_lightning
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lit_rlhf.durable import standing
from lit_rlhf.errors import InputError, check_number
from lit_rlhf.sharded_checkpoints import is_sharded_checkpoint, load_sharded, map_leaves, on_all_ranks, save_sharded

_WAIT = 1800.0  # seconds; torch's own for a process group


class DDPStrategy(of_lightning.DDPStrategy):
    """DDP whose ranks all end with what kept the first from writing a checkpoint, instead of waiting for it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a file on the first rank. All ranks call it."""
        with on_all_ranks():
            super().save_checkpoint(checkpoint, filepath, storage_options)


def ddp(timeout: float = _WAIT, find_unused_parameters: bool = False) -> DDPStrategy:
    """DDP: every rank has all of the weights, and gradients are averaged.

    Args:
        timeout: seconds that a rank waits for the others.
        find_unused_parameters: for a module of your own, some of whose weights get no gradient in some steps.
    """
    return DDPStrategy(timeout=_checked(timeout), find_unused_parameters=find_unused_parameters)


def deepspeed(
    stage: int = 2, timeout: float = _WAIT, offload_optimizer: bool = False, offload_parameters: bool = False
) -> DeepSpeedStrategy:
    """DeepSpeed's ZeRO; GPUs only, with checkpoints of its own.

    Args:
        stage: what is in shards: 1 the optimiser's state, 2 gradients too, 3 weights too.
        timeout: seconds that a rank waits for the others.
        offload_optimizer: hold the optimiser's state in the CPU's memory.
        offload_parameters: of stage 3, hold the weights there.

    Raises:
        InputError: the package is missing, or there is no GPU.
    """
    if stage not in (1, 2, 3):
        raise InputError(f"trainer.strategy.stage must be 1, 2 or 3, got {stage}")
    if find_spec("deepspeed") is None:
        raise InputError("trainer=deepspeed needs the package deepspeed: pip install 'lit_rlhf[deepspeed]'")
    if not torch.cuda.is_available():
        raise InputError("trainer=deepspeed needs a CUDA device, and there is none; write trainer=fsdp2 or trainer=ddp")
    return DeepSpeedStrategy(
        stage=stage,
        timeout=_checked(timeout),
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
    )


def _checked(timeout: float) -> timedelta:
    check_number("trainer.strategy.timeout", timeout, above=0)
    return timedelta(seconds=timeout)


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2: weights, gradients and optimiser state in shards over all ranks; `RLHFModule.configure_model` cuts them.

    A checkpoint is the file that any other strategy writes and reads, or, in a folder, what each rank holds; either is
    loaded without running code from it.

    Args:
        save_distributed_checkpoint: every rank writes its shards, and none ever holds all.
        process_group_backend: by default NCCL on GPUs and gloo on CPUs.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: float = _WAIT,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=_checked(timeout),
        )

    def setup_environment(self) -> None:
        """Connect the ranks. A mesh of one dimension is the default group, which has the timeout."""
        self._setup_distributed()
        ranks = (self.world_size,)
        self._device_mesh = init_device_mesh(self.root_device.type, ranks, mesh_dim_names=("data_parallel",))
        self._module._device_mesh = self._device_mesh

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether the optimiser's state is loaded apart from the checkpoint: so that a checkpoint is checked first."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights as a checkpoint has them."""
        return self._as_saved(self._module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state as a checkpoint has it."""
        return self._as_saved(optimizer.state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a file on the first rank, or every rank's part of a folder."""
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            save_sharded(checkpoint, path, self.global_rank, self.world_size)
            return
        with on_all_ranks():
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, or this rank's part of a folder."""
        path = standing(Path(self.broadcast(checkpoint_path)))
        if is_sharded_checkpoint(path):
            return load_sharded(path, self.global_rank, self.device_mesh)
        return self.checkpoint_io.load_checkpoint(path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the module its shards of the weights."""
        own = self._module.state_dict()
        saved = {name: _sharded_like(x, own.get(name)) for name, x in checkpoint["state_dict"].items()}
        self._module.load_state_dict(saved, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimisers their shards of what they know of each weight."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                i: {name: _sharded_like(x, parameters[i]) for name, x in of_parameter.items()}
                for i, of_parameter in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})
            _optimizer_to_device(optimizer, self.root_device)

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def _as_saved(self, state: dict[str, Any]) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return state
        whole = map_leaves(state, self._gathered)
        return whole if self.is_global_zero else {}

    def _gathered(self, x: Any) -> Any:
        """A weight as a whole, on the first rank's CPU; every rank has to ask, and keeps nothing."""
        if not isinstance(x, DTensor):
            return x
        found = x.full_tensor()
        return found.cpu() if self.is_global_zero else None


def _sharded_like(x: Any, like: Any) -> Any:
    """This rank's shard of a weight, or of a number for each of its entries; anything else is whole on every rank."""
    if not isinstance(like, DTensor) or isinstance(x, DTensor) or not isinstance(x, Tensor) or x.shape != like.shape:
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

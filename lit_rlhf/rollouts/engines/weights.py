"""A policy's weights as another program reads them: by the names of its Hugging Face folder, whole and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from lit_rlhf.models.adapters import is_adapted, merged

WEIGHTS = "model.safetensors"
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


@torch.no_grad()
def fingerprint(policy: nn.Module) -> list[int]:
    """Sums of every tensor's bits, weighed by their places: other weights, other sums.

    PyTorch's own counters will not do: AdamW's fused kernel does not count.
    """
    sums = [_sum_of_bits(x) for x in (*policy.parameters(), *policy.buffers())]
    found: list[int] = torch.stack(sums).tolist()
    return found


def _sum_of_bits(x: Tensor) -> Tensor:
    """Of all elements, each times its row, column, ...; int64, in which what overflows goes round."""
    bits = x.view(_INTEGER[x.element_size()])
    total = bits.sum(dtype=torch.int64)
    for dim, size in enumerate(x.shape):
        others = [d for d in range(x.ndim) if d != dim]
        along = bits.sum(others, dtype=torch.int64) if others else bits
        total = total + (along * torch.arange(1, size + 1, device=x.device)).sum()
    return total


@torch.no_grad()
def checkpoint_of(policy: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the policy's checkpoint by name, floats in `dtype`; adapters are merged.

    `lm_head.weight` is there even where it is the input embedding's: vLLM keeps the old one otherwise, and says so in a
    warning only.
    """
    model = merged(policy) if is_adapted(policy) else policy
    found: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in found.items()}


def write_config(policy: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the `config.json` that says what model the weights are of."""
    config = copy.deepcopy(policy.config)
    config.architectures, config.dtype = [type(policy).__name__], dtype
    config.save_pretrained(folder)


def write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the weights in one step: who reads them finds the old ones or the new ones."""
    partial = folder / f".{WEIGHTS}"
    held: set[int] = set()
    for name, x in tensors.items():  # safetensors has no two names for one tensor
        x = x.detach().to("cpu").contiguous()
        tensors[name] = x.clone() if x.data_ptr() in held else x
        held.add(tensors[name].data_ptr())
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)

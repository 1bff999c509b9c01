"""Scalar heads: what turns a hidden state into a value or a reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """One linear output without a bias, in float32 whatever the trunk computes in.

    Args:
        model: the causal language model whose hidden states it reads; a float64 model gets a float64 head.
        std: of the initial weights; 0 for a value function that begins at 0 everywhere.
    """

    def __init__(self, model: nn.Module, std: float = 0.0) -> None:
        super().__init__()
        config: Any = model.config
        size = config.get_text_config(decoder=True).hidden_size
        weights = next(model.parameters())
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=weights.device))
        if std:
            nn.init.normal_(self.weight, std=std)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., H]` to `[...]`."""
        with torch.autocast(hidden.device.type, enabled=False):  # 8 bits of mantissa are too few for a regression
            return hidden.to(self.weight.dtype) @ self.weight

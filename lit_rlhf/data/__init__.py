"""Data: rows from files, built-in tasks, the token ids of prompts and completions, and the data modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_rlhf.data.sources import read_rows
from lit_rlhf.text import encode_completion, encode_prompt

if TYPE_CHECKING:
    from lit_rlhf.data.modules import ArithmeticData, FileData, RowsDataModule

_MODULES = ("ArithmeticData", "FileData", "RowsDataModule")

__all__ = ["ArithmeticData", "FileData", "RowsDataModule", "encode_completion", "encode_prompt", "read_rows"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # they need Lightning; reading rows does not
        from lit_rlhf.data import modules

        return getattr(modules, name)
    raise AttributeError(f"module 'lit_rlhf.data' has no attribute {name!r}")

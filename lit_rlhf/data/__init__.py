"""Data: rows from files, built-in tasks, the token ids of prompts and completions, and the data modules."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lit_rlhf.data.sources import read_rows
from lit_rlhf.text import encode_completion, encode_prompt

if TYPE_CHECKING:
    from lit_rlhf.data.modules import ArithmeticData, FileData, RowsDataModule
    from lit_rlhf.data.reasoning import ReasoningGymData

_HOMES = {
    "ArithmeticData": "modules",
    "FileData": "modules",
    "RowsDataModule": "modules",
    "ReasoningGymData": "reasoning",
}

__all__ = [
    "ArithmeticData",
    "FileData",
    "ReasoningGymData",
    "RowsDataModule",
    "encode_completion",
    "encode_prompt",
    "read_rows",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # they need Lightning; reading rows does not
        return getattr(import_module(f"lit_rlhf.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lit_rlhf.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

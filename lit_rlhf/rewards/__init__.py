"""Rewards: plain functions of completions, reward models, and what calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_rlhf.rewards.functions import DataRewards, RewardFunctions, TrainerState, reward_functions, verifier
from lit_rlhf.rewards.judges import Judges
from lit_rlhf.rewards.shaping import cosine_length, overlong, regex_format, repetition_penalty
from lit_rlhf.rewards.verifiers import exact_match, final_number, math_expression, numeric_answer, text_of

if TYPE_CHECKING:
    from lit_rlhf.rewards.models import RewardModel

__all__ = [
    "DataRewards",
    "Judges",
    "RewardFunctions",
    "RewardModel",
    "TrainerState",
    "cosine_length",
    "exact_match",
    "final_number",
    "math_expression",
    "numeric_answer",
    "overlong",
    "regex_format",
    "repetition_penalty",
    "reward_functions",
    "text_of",
    "verifier",
]


def __getattr__(name: str) -> Any:
    if name == "RewardModel":  # it needs Transformers; plain functions do not
        from lit_rlhf.rewards.models import RewardModel

        return RewardModel
    raise AttributeError(f"module 'lit_rlhf.rewards' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Rewards: plain functions of completions, reward models, and what calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_rlhf.rewards.functions import RewardFunctions, reward_functions, verifier
from lit_rlhf.rewards.judges import Judges
from lit_rlhf.rewards.verifiers import exact_match, final_number, numeric_answer

if TYPE_CHECKING:
    from lit_rlhf.rewards.models import RewardModel

__all__ = [
    "Judges",
    "RewardFunctions",
    "RewardModel",
    "exact_match",
    "final_number",
    "numeric_answer",
    "reward_functions",
    "verifier",
]


def __getattr__(name: str) -> Any:
    if name == "RewardModel":  # it needs Transformers; plain functions do not
        from lit_rlhf.rewards.models import RewardModel

        return RewardModel
    raise AttributeError(f"module 'lit_rlhf.rewards' has no attribute {name!r}")

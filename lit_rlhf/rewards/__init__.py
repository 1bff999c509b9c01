"""Rewards: plain functions of completions, and what calls them."""

from lit_rlhf.rewards.functions import RewardFunctions, reward_functions, verifier
from lit_rlhf.rewards.verifiers import exact_match, final_number, numeric_answer

__all__ = ["RewardFunctions", "exact_match", "final_number", "numeric_answer", "reward_functions", "verifier"]

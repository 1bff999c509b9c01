"""Rollouts: sampling completions, scoring them, and what the trainer iterates over."""

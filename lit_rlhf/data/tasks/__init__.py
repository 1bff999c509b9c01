"""Built-in tasks: generated, verifiable, offline."""

from lit_rlhf.data.tasks.arithmetic import arithmetic_splits, demonstrations, preference_pairs, sloppy_answer
from lit_rlhf.data.tasks.tokenizer import character_tokenizer

__all__ = ["arithmetic_splits", "character_tokenizer", "demonstrations", "preference_pairs", "sloppy_answer"]

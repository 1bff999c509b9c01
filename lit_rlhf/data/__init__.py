"""Data: rows from files, built-in tasks, and the token ids of prompts and completions."""

from lit_rlhf.data.rows import encode_completion, encode_prompt, read_rows

__all__ = ["encode_completion", "encode_prompt", "read_rows"]

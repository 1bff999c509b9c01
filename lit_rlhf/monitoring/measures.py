"""What runs are judged by on held-out data, and tables of it for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

REWARD, PERPLEXITY = "val/reward_sampled", "val/perplexity"
MEASURES = {  # the first that a run has is what it is for
    "val/accuracy_sampled": "sampled accuracy",
    "val/accuracy_greedy": "greedy accuracy",
    "val/preference_accuracy": "preference accuracy",
    REWARD: "mean reward",
    PERPLEXITY: "perplexity",
}


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Rows of text as columns, those of the numbers `left` to the left and the others to the right.

    >>> print(aligned([("algorithm", "reward"), ("grpo", "0.5")], left=(0,)))
    algorithm  reward
    grpo          0.5
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [f"<{width}" if i in left else f">{width}" for i, width in enumerate(widths)]
    return "\n".join("  ".join(map(format, line, sides)).rstrip() for line in lines)

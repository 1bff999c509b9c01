"""Builders of the preference tests: random pairs, rows of them, and their log-probs one sequence at a time."""

import torch

from lit_rlhf.types import PreferenceBatch
from tests.helpers import VOCABULARY, mask_of, plain_logprobs, prompt_rows

CHOSEN, REJECTED, PROMPTS = (3, 7, 1, 5, 2, 6), (2, 4, 6, 5, 1, 3), (2, 5, 1, 4, 5, 3)


def random_pairs(chosen=CHOSEN, rejected=REJECTED, prompts=PROMPTS, seed=0, **extra):
    """Pairs of uneven lengths; 0 and 0 is a pair that counts for nothing."""
    g = torch.Generator().manual_seed(seed)
    N, P, T = len(chosen), max(prompts), max(*chosen, *rejected, 1)
    tokens = lambda *shape: torch.randint(2, VOCABULARY, shape, generator=g)  # noqa: E731
    return PreferenceBatch(
        prompt_ids=tokens(N, P),
        prompt_mask=mask_of(prompts, P, left=True),
        chosen_ids=tokens(N, T),
        chosen_mask=mask_of(chosen, T),
        rejected_ids=tokens(N, T),
        rejected_mask=mask_of(rejected, T),
        **extra,
    )


def side_of(batch, side):
    """One completion of every pair under the names that the helpers know."""
    prompts = {"prompt_ids": batch.prompt_ids, "prompt_mask": batch.prompt_mask}
    return prompts | {"response_ids": getattr(batch, f"{side}_ids"), "response_mask": getattr(batch, f"{side}_mask")}


def plain_pairs(model, batch):
    """Log-probs `[N, T]` of the chosen and of the rejected completions, each sequence on its own."""
    return tuple(plain_logprobs(model, side_of(batch, side)) for side in ("chosen", "rejected"))


def sequences(batch, side):
    """Every prompt with its completion as one list of tokens."""
    found = []
    for i in range(len(batch)):
        completion = getattr(batch, f"{side}_ids")[i][getattr(batch, f"{side}_mask")[i]]
        found.append(batch.prompt_ids[i][batch.prompt_mask[i]].tolist() + completion.tolist())
    return found


def pair_rows(count, **columns):
    """Rows of text for `NumberTokenizer`: prompts and completions of different lengths."""
    return [
        {
            **row,
            "chosen": " ".join(str(2 + (3 * i + j) % 60) for j in range(1 + i % 5)),
            "rejected": " ".join(str(2 + (5 * i + 7 * j) % 60) for j in range(1 + i % 3)),
            **{name: values[i] for name, values in columns.items()},
        }
        for i, row in enumerate(prompt_rows(count))
    ]

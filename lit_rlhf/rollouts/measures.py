"""What is measured of judged completions, in validation and in evaluation alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lit_rlhf.functional import majority_at_k, pass_at_k
from lit_rlhf.rewards import Judges
from lit_rlhf.types import ScoredRollout


def measures(
    rollout: ScoredRollout, judges: Judges, completions: Sequence[str], group_size: int, ks: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Numbers by name, `[N]` of completions or `[B]` of prompts; NaN where something does not apply.

    Args:
        rollout: N = B * group_size completions, prompt by prompt, scored by `judges`.
        judges: what scored them.
        completions: their texts, which vote.
        group_size: completions per prompt.
        ks: of pass@k and maj@k, at most `group_size` each; maj@1 is pass@1. A prompt with fewer verdicts than k has
            neither.
    """
    right, found = judges.accuracy(rollout.reward_parts), {}
    if right is not None:
        found["accuracy"] = right
        verdicts = right.double().view(-1, group_size).cpu()
        answers = judges.answers(completions) if ks else []
        voters = [answers[i : i + group_size] for i in range(0, len(answers), group_size)]
        found |= {f"pass_at_{k}": passes(verdicts, k) for k in ks}
        found |= {f"maj_at_{k}": majorities(verdicts, voters, k) for k in ks if k > 1}
    found["reward"] = rollout.raw_rewards
    found |= {f"rewards/{name}": rollout.reward_parts[:, i] for i, name in enumerate(judges.names)}
    return {**found, "response_length": rollout.lengths.double(), "truncated_fraction": rollout.truncated.double()}


def passes(verdicts: Tensor, k: int) -> Tensor:
    """pass@k `[B]` of verdicts `[B, G]`, 1 right and 0 wrong; NaN of prompts with fewer than k verdicts."""
    given = ~verdicts.isnan()
    samples, correct = given.sum(1), (verdicts.nan_to_num(0) > 0).sum(1)
    found = torch.full((len(verdicts),), torch.nan, dtype=torch.float64)
    if (enough := samples >= k).any():
        found[enough] = pass_at_k(samples[enough], correct[enough], k)
    return found


def majorities(verdicts: Tensor, answers: Sequence[Sequence[Hashable | None]], k: int) -> Tensor:
    """maj@k `[B]` of verdicts `[B, G]` and the answers voted for; NaN of prompts with fewer than k verdicts."""
    found = []
    for row, voted in zip(verdicts.tolist(), answers, strict=True):
        votes: dict[Hashable | None, list[float]] = {}
        for verdict, answer in zip(row, voted, strict=True):
            if verdict == verdict:
                votes.setdefault(answer, []).append(verdict)
        abstained = len(votes.pop(None, []))
        if sum(map(len, votes.values())) + abstained < k:
            found.append(float("nan"))
            continue
        right = [sum(given) / len(given) for given in votes.values()]
        found.append(majority_at_k([len(given) for given in votes.values()], right, k, abstained))
    return torch.tensor(found, dtype=torch.float64)

"""Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): keep only groups that teach something, refill the rest.

A group in which every completion earned the same raw reward has advantage zero and no gradient. Such groups
are dropped and more prompts sampled, until the batch is full or the rounds run out. All ranks take the same
number of rounds and draw the same number of prompts, because both are decided from all-reduced counts. A rank
that is full before the others keeps no more than the next batch can use: a carried row is one rollout old, never two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lit_rlhf.types import ScoredRollout, concatenate


@dataclass(frozen=True)
class Refilled:
    """A full batch and what it took."""

    rollout: ScoredRollout  # `groups * group_size` rows, filler rows with an empty response mask
    surplus: ScoredRollout | None  # informative groups beyond the batch, for the next rollout; one batch at most
    rounds: int  # sampling rounds, the first included
    filler: Tensor  # [N] bool, rows without weight


def informative(rollout: ScoredRollout) -> Tensor:
    """Rows `[N]` bool whose group's raw rewards differ; for a 0/1 reward: 0 < #correct < G.

    Rewards that are NaN (no reward function applies) count for nothing.
    """
    ids, group = torch.unique(rollout.group_ids, return_inverse=True)
    valid = ~rollout.raw_rewards.isnan()
    rewards, group_of = rollout.raw_rewards[valid], group[valid]
    low = rewards.new_full((len(ids),), float("inf")).scatter_reduce(0, group_of, rewards, "amin")
    high = rewards.new_full((len(ids),), float("-inf")).scatter_reduce(0, group_of, rewards, "amax")
    return (high > low)[group]


def alone(rollout: ScoredRollout) -> Tensor:
    """Rows `[N]` bool that are the only one of their group with a reward: there is nothing to compare them with."""
    group = torch.unique(rollout.group_ids, return_inverse=True)[1]
    valid = ~rollout.raw_rewards.isnan()
    return valid & (torch.bincount(group, weights=valid.double())[group] == 1)


def refill(
    first: ScoredRollout,
    carried: ScoredRollout | None,
    more: Callable[[int], ScoredRollout],
    groups: int,
    group_size: int,
    max_rounds: int,
) -> Refilled:
    """Fill a batch of `groups` informative groups.

    Args:
        first: the rollout sampled for this batch, rows of a group side by side.
        carried: informative groups left over from the batch before; they are used first.
        more: samples that many further prompts on this rank.
        groups: groups wanted on this rank.
        group_size: G.
        max_rounds: sampling rounds at most, the first included. When they run out the batch is completed
            with uninformative groups whose response mask is empty: they weigh nothing and count as nothing.
    """
    useful = informative(first)
    kept = ([carried] if carried is not None else []) + [first[useful]]
    dropped, rounds = [first[~useful]], 1
    while rounds < max_rounds:
        missing, rate = _agree(groups - _count(kept, group_size), useful)
        if missing <= 0:
            break
        new = more(min(groups, -int(-missing // max(rate, 1 / groups))))
        useful = informative(new)
        kept.append(new[useful])
        dropped.append(new[~useful])
        rounds += 1
    found, spare = concatenate(kept), concatenate(dropped)
    wanted = groups * group_size
    surplus = found[wanted : 2 * wanted] if len(found) > wanted else None
    lacking = max(0, wanted - len(found))
    filler = torch.arange(wanted, device=found.group_ids.device) >= wanted - lacking
    rollout = concatenate([found[:wanted], _emptied(spare[:lacking])])
    return Refilled(rollout, surplus, rounds, filler)


def _count(rollouts: list[ScoredRollout], group_size: int) -> int:
    return sum(len(rollout) for rollout in rollouts) // group_size


def _emptied(rollout: ScoredRollout) -> ScoredRollout:
    return replace(rollout, response_mask=torch.zeros_like(rollout.response_mask))


def _agree(missing: int, useful: Tensor) -> tuple[int, float]:
    """The largest number of missing groups over the ranks, and the smallest share of informative rows."""
    rate = float(useful.float().mean()) if len(useful) else 0.0
    if dist.is_available() and dist.is_initialized():
        both = torch.tensor([float(missing), -rate], device=useful.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return int(both[0]), -float(both[1])
    return missing, rate

"""A bounded buffer of past rollouts, drawn from again by groups."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from typing_extensions import Self

from lit_rlhf.rollouts.random import permutation
from lit_rlhf.types import ScoredRollout, concatenate


@dataclass
class ReplayBuffer:
    """The rows of the newest rollouts, on the CPU; what is drawn depends on the contents and the seed alone.

    Args:
        capacity: rollouts held; the oldest leaves when one more comes.
        rollouts: oldest first.
    """

    capacity: int
    rollouts: list[ScoredRollout]

    def __len__(self) -> int:
        """Rows held."""
        return sum(len(rollout) for rollout in self.rollouts)

    def add(self, rollout: ScoredRollout) -> None:
        """Append a rollout; beyond `capacity` the oldest is dropped."""
        self.rollouts = [*self.rollouts, rollout.to("cpu")][-self.capacity :]

    def draw(self, groups: int, min_age: int, *seed: int) -> ScoredRollout:
        """Whole groups of samples of one prompt, uniformly and without repetition.

        Args:
            groups: how many; no more than the buffer holds.
            min_age: rollouts added since at the least; where none is so old, the oldest one is drawn from.
            *seed: integers that the choice depends on.
        """
        eligible = self.rollouts[: max(1, len(self.rollouts) - min_age)]
        rows = concatenate(eligible)
        ids = torch.unique(rows.group_ids)
        chosen = ids[permutation(len(ids), *seed)[:groups]]
        order = torch.cat([(rows.group_ids == group).nonzero().flatten() for group in chosen])
        return rows[order].trim()

    def to_plain(self) -> dict[str, Any]:
        """Tensors and plain containers only, as checkpoints hold them."""
        plain = [{f.name: getattr(r, f.name) for f in fields(r)} for r in self.rollouts]
        return {"capacity": self.capacity, "rollouts": plain}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """The inverse of `to_plain`."""
        return cls(plain["capacity"], [ScoredRollout(**rows) for rows in plain["rollouts"]])

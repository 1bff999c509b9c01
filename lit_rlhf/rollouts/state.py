"""Where the training loop stands: held by the module, saved in its checkpoint, so that a killed run resumes exactly."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from lit_rlhf.types import Experience, Rollout, ScoredRollout


@dataclass
class LoopState:
    """Position in the endless sequence of rollouts (on-policy) or passes over the data (SFT, preferences).

    It is plain data: randomness is counter-based from (seed, position), so no generator state is needed.
    """

    iteration: int = 0  # rollouts, or passes over the data, completed
    position: int = 0  # micro-batches already taken from this one
    prompts_seen: int = 0  # prompts drawn from the stream so far, over all ranks
    experience: Experience | None = None  # the rollout being trained on
    carried: ScoredRollout | None = None  # surplus groups of dynamic sampling, for the next rollout

    def finish_iteration(self) -> None:
        """Move on to the next rollout or pass."""
        self.iteration, self.position, self.experience = self.iteration + 1, 0, None

    def to_plain(self) -> dict[str, Any]:
        """Tensors and plain containers only, as checkpoints hold them."""
        return {f.name: _to_plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> LoopState:
        """The inverse of `to_plain`."""
        state = cls(**{**plain, "experience": None, "carried": None})
        if plain["experience"] is not None:
            state.experience = Experience(**plain["experience"])
        if plain["carried"] is not None:
            state.carried = ScoredRollout(**plain["carried"])
        return state


def _to_plain(value: Any) -> Any:
    if isinstance(value, Rollout):
        plain: dict[str, Tensor | None] = {f.name: getattr(value, f.name) for f in fields(value)}
        return plain
    return value

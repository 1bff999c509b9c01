"""What a preference algorithm makes of its pairs, and what is logged of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from lit_rlhf.types import PreferenceBatch

_Cells: TypeAlias = dict[str, tuple[Tensor | float, Tensor | None]]


@dataclass(frozen=True)
class Comparison:
    """What an algorithm makes of N pairs."""

    chosen: Tensor  # [N] reward of the preferred completion
    rejected: Tensor  # [N] reward of the other one
    losses: dict[str, Tensor]  # by name, [N] each: the terms of the loss, coefficients included
    logged: dict[str, Tensor] = field(default_factory=dict)  # by name, [N] each: what else is logged of the pairs


def pair_stats(compared: Comparison, batch: PreferenceBatch) -> _Cells:
    """`preference/...`: how the rewards rank the pairs, the rewards themselves, and what the algorithm adds."""
    every = {"chosen_reward": compared.chosen, "rejected_reward": compared.rejected, **compared.logged}
    return ranking("preference", compared, batch) | _cells("preference", every, batch)


def ranking(section: str, compared: Comparison, batch: PreferenceBatch) -> _Cells:
    """Accuracy and margin of the rewards. Equal rewards rank nothing: such a pair counts as wrong."""
    right, margin = (compared.chosen > compared.rejected).float(), compared.chosen - compared.rejected
    return _cells(section, {"preference_accuracy": right, "reward_margin": margin}, batch)


def _cells(section: str, per_pair: Mapping[str, Tensor], batch: PreferenceBatch) -> _Cells:
    present = batch.response_mask.any(1)
    return {f"{section}/{name}": (values.detach(), present) for name, values in per_pair.items()}

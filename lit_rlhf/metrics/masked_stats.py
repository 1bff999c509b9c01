"""One metric for everything that a training module logs: two states to synchronise, however many names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lit_rlhf.metrics.base import (
    MomentsMetric,
    _moments_update,
    effective_share,
    half_width,
    maximum,
    mean,
    minimum,
    std,
)

Cells: TypeAlias = Mapping[str, tuple[Tensor | float, Tensor | None]]  # name -> values and the mask of those that count
_STATISTICS = {
    "value": mean,
    "mean": mean,
    "std": std,
    "max": maximum,
    "min": minimum,
    "ess": effective_share,
}
_BARE = ("value", "ess")  # logged under the name itself


class MaskedStats(MomentsMetric):
    """Masked mean, standard deviation and extremes of many named quantities, exact over batches and ranks.

    `update` never waits for the device. Sums are float64; the standard deviation is unbiased.

    Args:
        names: the quantities. A list logs the mean of each under its own name; a mapping says what to log of each:
            "value" is the mean under the bare name, "mean", "std", "max" and "min" go under `name_mean` and so on;
            "ess", under the bare name, is the effective share (Σw)² / (n·Σw²) of a sample with these weights, and
            "ci" half of the 95 % interval of rates, one of each prompt.
        samples: how many completions such a rate is of.
        **kwargs: of `torchmetrics.Metric`.

    >>> stats = MaskedStats({"ratio": ("mean", "max"), "entropy": ("value",)})
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> stats.update({"ratio": (torch.tensor([[1.0, 3.0], [2.0, float("nan")]]), mask), "entropy": (0.5, None)})
    >>> {name: value.item() for name, value in stats.compute().items()}
    {'ratio_mean': 2.0, 'ratio_max': 3.0, 'entropy': 0.5}
    """

    def __init__(self, names: Iterable[str] | Mapping[str, Iterable[str]], *, samples: int = 1, **kwargs: Any) -> None:
        wanted = names if isinstance(names, Mapping) else dict.fromkeys(names, ("value",))
        self.wanted = {name: tuple(statistics) for name, statistics in wanted.items()}
        unknown = {s for statistics in self.wanted.values() for s in statistics} - {*_STATISTICS, "ci"}
        if unknown:
            raise ValueError(
                f"statistics must be among {', '.join((*_STATISTICS, 'ci'))}, got {', '.join(sorted(unknown))}"
            )
        super().__init__(len(self.wanted), **kwargs)
        self.samples = samples
        self._column_of = {name: column for column, name in enumerate(self.wanted)}

    def extend(self, names: Iterable[str], statistics: Sequence[str] = ()) -> None:
        """Log these quantities too: these statistics of them, or the mean of those that are not known already."""
        names = list(names)
        new = [name for name in names if name not in self.wanted]
        self.wanted |= dict.fromkeys(new, () if statistics else ("value",))
        self.wanted |= {name: tuple(dict.fromkeys((*self.wanted[name], *statistics))) for name in names}
        if not new:
            return
        self._column_of = {name: column for column, name in enumerate(self.wanted)}
        for state in ("sums", "highs"):
            empty = self._defaults[state]
            assert isinstance(empty, Tensor)
            added = empty.new_full((len(empty), len(new)), 0.0 if state == "sums" else -torch.inf)
            self._defaults[state] = torch.cat([empty, added], 1)
            held: Tensor = getattr(self, state)
            setattr(self, state, torch.cat([held, added.to(held.device)], 1))

    def align(self, names: Sequence[str]) -> None:
        """Bring the columns into this order, which has every name known here: ranks have to agree before they sum."""
        self.extend(names)
        order = [self._column_of[name] for name in names]
        for state in ("sums", "highs"):
            empty, held = self._defaults[state], getattr(self, state)
            assert isinstance(empty, Tensor)
            self._defaults[state] = empty[:, order]
            setattr(self, state, held[:, order])
        self.wanted = {name: self.wanted[name] for name in names}
        self._column_of = {name: column for column, name in enumerate(self.wanted)}

    def update(self, values: Cells) -> None:
        """Count `{name: (values, mask)}` for any of the names.

        Values are `[N, T]`, `[N]` or a scalar, the mask has their shape; `None` counts all.

        Raises:
            ValueError: a name that is not among the wanted ones.
        """
        if unknown := values.keys() - self.wanted.keys():
            raise ValueError(f"unknown name {', '.join(sorted(unknown))}: this metric knows {', '.join(self.wanted)}")
        if not values:
            return
        columns = torch.tensor([self._column_of[name] for name in values], device=self.device)
        new = _moments_update(*((torch.as_tensor(x, device=self.device), mask) for x, mask in values.values()))
        self.sums = self.sums.index_add(1, columns, new.sums)
        self.highs = self.highs.index_copy(1, columns, torch.maximum(self.highs[:, columns], new.highs))

    def compute(self) -> dict[str, Tensor]:
        """Every wanted statistic by its logged name, a scalar each; names that nothing was counted of are left out."""
        moments, counted = self.moments, self.moments.sums[0].tolist()
        by_statistic = {statistic: of(moments) for statistic, of in _STATISTICS.items()}
        by_statistic["ci"] = half_width(moments, self.samples)
        return {
            name if statistic in _BARE else f"{name}_{statistic}": by_statistic[statistic][k]
            for k, (name, statistics) in enumerate(self.wanted.items())
            for statistic in statistics
            if counted[k]
        }

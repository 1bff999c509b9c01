"""What validation and evaluation score with: the rewards, and what the data itself can verify."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lit_rlhf.rewards.functions import TIMEOUT, DataRewards, RewardFunctions, solved
from lit_rlhf.rewards.resolving import RewardFunction, unique, unwrapped
from lit_rlhf.types import Row


class Judges:
    """The reward functions of a run, then verifiers that count nothing towards the reward.

    So a run that trains on a reward model, or on a function of the user's own, still reports how often its completions
    are right where the data can tell.

    Args:
        rewards: the reward functions; without any the verifiers take their place. Their timeout is the verifiers', too.
        verifiers: the data module's own reward functions; those that `rewards` has already are left out.

    Attributes:
        names: one unique name per function, the rewards' first.

    >>> from lit_rlhf.rewards import exact_match
    >>> def short(completions, **kwargs):
    ...     return [-len(c) for c in completions]
    >>> judges = Judges(RewardFunctions([short]), [exact_match])
    >>> total, parts = judges(["1+1=", "1+2="], ["2", "44"], [[5], [7, 7]], {"answer": ["2", "3"]})
    >>> total, judges.accuracy(parts)
    (tensor([-1., -2.]), tensor([1., 0.]))
    """

    def __init__(
        self, rewards: RewardFunctions | DataRewards | None, verifiers: Sequence[RewardFunction | str] = ()
    ) -> None:
        timeout = TIMEOUT if rewards is None else rewards.timeout
        rewards = rewards if isinstance(rewards, RewardFunctions) else None
        known = [] if rewards is None else [unwrapped(fn) for fn in rewards.funcs]
        extra = [fn for fn in RewardFunctions(verifiers).funcs if unwrapped(fn) not in known] if verifiers else []
        self.scored_by = [] if rewards is None else [rewards]
        self.scored_by += [RewardFunctions(extra, timeout=timeout)] if extra else []
        self.names = unique([name for functions in self.scored_by for name in functions.names])

    def __bool__(self) -> bool:
        """Whether there is anything to score with."""
        return bool(self.scored_by)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
    ) -> tuple[Tensor, Tensor]:
        """Score N completions: the rewards' weighted sum `[N]`, and what each function says `[N, F]`; NaN as there."""
        found = [functions(prompts, completions, completion_ids, columns) for functions in self.scored_by]
        return found[0][0], torch.cat([parts for _, parts in found], 1)

    def check(self, rows: Sequence[Row]) -> None:
        """See `RewardFunctions.check`."""
        for functions in self.scored_by:
            functions.check(rows)

    def to(self, device: torch.device | str) -> Judges:
        """Move the reward models to `device`."""
        for functions in self.scored_by:
            functions.to(device)
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """Hold the reward models in shards over the ranks of the mesh."""
        for functions in self.scored_by:
            functions.shard(mesh)

    @property
    def verifier(self) -> tuple[int, RewardFunction] | None:
        """Column and function of the first verifier; None if no function is one."""
        every = [unwrapped(fn) for functions in self.scored_by for fn in functions.funcs]
        return next(((column, fn) for column, fn in enumerate(every) if getattr(fn, "verifies", False)), None)

    def accuracy(self, parts: Tensor) -> Tensor | None:
        """`[N]`, 1 where the first verifier's column of `parts` `[N, F]` is 1, else 0; None if no function is one."""
        return None if self.verifier is None else solved(parts[:, self.verifier[0]])

    def answers(self, completions: Sequence[str]) -> list[Hashable | None]:
        """What each completion answers, for a majority vote; None where it gives no answer.

        By the verifier's own reading (`@verifier(answer=...)`), else the text without white space around it.
        """
        read = str.strip if self.verifier is None else getattr(self.verifier[1], "answer", None) or str.strip
        return [read(completion) for completion in completions]

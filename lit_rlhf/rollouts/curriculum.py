"""Curriculum by success rate: prompts are drawn most often where the model is between never and always right.

    q_i ~ 4 p_i (1 - p_i) + floor        p_i = (right_i + prior m_i) / (tries_i + prior)

p (1 - p) is the variance of a reward that is 1 with chance p: prompts that every sample answers rightly, or none, teach
nothing. (Tzannetos et al., arXiv 2304.12877, choose tasks by it, and so do Rutherford et al., arXiv 2408.15099, who
call it learnability.) `right_i` of `tries_i` completions of row i were right. Both are multiplied by `decay` when a
rollout samples the row again, so that what the model does now counts most. p_i is the mean of a Beta distribution that
had mean m_i and the weight of `prior` completions before the row was tried: few tries move it little from m_i, the
rate of the row's level, (right + 1) / (tries + 2), counted and decayed in the same way over all rows of the level.
Without a column of levels all rows are of one. `floor` keeps every row in the draw: what is never or always right is
tried again from time to time, and comes back when it changes, or when its level does.

A rollout draws without replacement, by an exponential race (Efraimidis and Spirakis, "Weighted random sampling with a
reservoir", 2006): row i's clock rings after -log(1 - u_i) / q_i, and the rows are drawn in that order. The u_i are a
function of (seed, rollout), and the rates are those at its beginning: the order needs no state of its own, is the same
on every rank, and a refill goes on where the draw before it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from lit_rlhf.errors import InputError, check_choice, check_number
from lit_rlhf.metrics import Cells
from lit_rlhf.ranks import gather_objects
from lit_rlhf.rewards import RewardFunctions
from lit_rlhf.rollouts.loader import PromptStream
from lit_rlhf.rollouts.random import mix_seed, uniforms
from lit_rlhf.text import Text
from lit_rlhf.types import PromptBatch, Row

if TYPE_CHECKING:
    from lit_rlhf.algorithms.on_policy import OnPolicyModule
    from lit_rlhf.rollouts.state import LoopState

Kind = Literal["none", "success_rate"]
_DRAW = 2  # keeps its random numbers apart from those of the samples
_MOST_LEVELS = 20  # that are logged one by one


class CurriculumArgs(TypedDict, total=False):
    """The keyword arguments of `SuccessCurriculum`."""

    curriculum: Kind
    curriculum_level: str | None
    curriculum_decay: float
    curriculum_prior: float
    curriculum_floor: float


@dataclass(frozen=True)
class SuccessCounts:
    """Right completions and all completions, decayed: float64 on the CPU, `[n]` for n rows or levels."""

    right: Tensor
    tries: Tensor

    @classmethod
    def none(cls, count: int) -> SuccessCounts:
        """Nothing tried yet."""
        return cls(*torch.zeros(2, count, dtype=torch.float64))

    def plus(self, index: Tensor, right: Tensor, tries: Tensor, decay: float) -> SuccessCounts:
        """With the completions of another rollout, after those counted before of the same rows have decayed.

        Args:
            index: `[k]` int64, whose they are; one may occur several times.
            right: `[k]` float64, how many were right.
            tries: `[k]` float64, out of how many.
            decay: factor of what was counted before.
        """
        kept = torch.ones_like(self.tries).index_fill(0, index, decay)
        return SuccessCounts(
            (self.right * kept).index_add(0, index, right), (self.tries * kept).index_add(0, index, tries)
        )

    def rates(self, mean: Tensor | float, prior: float) -> Tensor:
        """`[n]`, shrunk towards `mean` as if `prior` completions had been right at that rate."""
        return (self.right + prior * mean) / (self.tries + prior)


@dataclass
class CurriculumState:
    """What a run has found out about its rows: held by the loop state, saved in checkpoints."""

    rows: SuccessCounts
    levels: SuccessCounts
    first: int = 0  # stream position that the rollout begins at

    def to_plain(self) -> dict[str, Any]:
        """Tensors and plain containers only, as checkpoints hold them."""
        return {"rows": dict(vars(self.rows)), "levels": dict(vars(self.levels)), "first": self.first}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> CurriculumState:
        """The inverse of `to_plain`."""
        return cls(SuccessCounts(**plain["rows"]), SuccessCounts(**plain["levels"]), plain["first"])


class CurriculumStream(PromptStream):
    """The sequence of prompts whose row at a stream position is `row_of(position)`."""

    def __init__(self, rows: Sequence[Row], encode: Callable[[Text], list[int]], row_of: Callable[[int], int]) -> None:
        super().__init__(rows, encode, seed=0)
        self.row_of = row_of

    def _row(self, position: int) -> int:
        return self.row_of(position)


class SuccessCurriculum:
    """The arguments `curriculum*` of the on-policy algorithms: which prompts a rollout draws.

    Args:
        curriculum: `"none"`, every prompt once per pass over the data, or `"success_rate"`, most often those that are
            neither always nor never answered rightly; right is what the first verifier among the reward functions says.
        curriculum_level: column of the rows' level of difficulty; None: all are of one.
        curriculum_decay: factor of earlier completions of a row or level, when a rollout samples it again.
        curriculum_prior: completions of a row that the rate of its level weighs as much as.
        curriculum_floor: what is added to every row's weight, which is 1 where the model is right half of the time and
            0 where it never or always is.
    """

    def __init__(
        self,
        curriculum: Kind = "none",
        curriculum_level: str | None = None,
        curriculum_decay: float = 0.5,
        curriculum_prior: float = 1.0,
        curriculum_floor: float = 0.05,
    ) -> None:
        check_choice("algo.curriculum", curriculum, ("none", "success_rate"))
        check_number("algo.curriculum_decay", curriculum_decay, at_least=0)
        check_number("algo.curriculum_prior", curriculum_prior, above=0)
        check_number("algo.curriculum_floor", curriculum_floor, above=0)
        if curriculum_decay > 1:
            raise InputError(f"algo.curriculum_decay must be from 0 to 1, got {curriculum_decay}")
        self.kind, self.column, self.decay = curriculum, curriculum_level, curriculum_decay
        self.prior, self.floor = curriculum_prior, curriculum_floor
        self._levels: list[str] = []  # their names
        self._level_of = torch.zeros(0, dtype=torch.long)  # [rows]
        self._seed = 0
        self._noted: list[Tensor] = []  # of this rollout on this rank, each [4, B]: position, row, right, tries
        self._order: tuple[CurriculumState | None, int, list[int]] = (None, 0, [])

    @property
    def run_shape(self) -> dict[str, Any]:
        """See `RLHFModule.run_shape`."""
        return {"algo.curriculum": self.kind, "algo.curriculum_level": self.column}

    def stream(self, module: OnPolicyModule, rows: Sequence[Row]) -> PromptStream:
        """The sequence of prompts that `module` draws its rollouts from.

        Raises:
            InputError: see `check`.
        """
        if self.kind == "none":
            return PromptStream(rows, module.encode_prompt, module.seed)
        assert module.rewards is not None
        self.check(module.rewards, rows)
        names = ["" if self.column is None else str(row.get(self.column)) for row in rows]
        self._levels = list(dict.fromkeys(names))
        place = {name: i for i, name in enumerate(self._levels)}
        self._level_of, self._seed = torch.tensor([place[name] for name in names]), module.seed
        return CurriculumStream(rows, module.encode_prompt, lambda i: self._row(self._state(module.loop), i))

    def check(self, rewards: RewardFunctions, rows: Sequence[Row]) -> None:
        """Look for what can be known before anything is sampled.

        Raises:
            InputError: no reward function is a verifier, or the rows have no column of levels of that name.
        """
        if rewards.accuracy(torch.zeros(0, len(rewards.names))) is None:
            raise InputError(
                "algo.curriculum=success_rate needs a verifier, and none of the reward functions is one "
                f"({', '.join(rewards.names)}); mark yours with @lit_rlhf.rewards.verifier, or add one such as "
                "lit_rlhf.rewards.exact_match, by reward.weights with weight 0 if it is not to be trained on"
            )
        if self.column is not None and rows and self.column not in rows[0]:
            raise InputError(
                f"algo.curriculum_level={self.column}: the rows have no such column; they have {', '.join(rows[0])}"
            )

    def _state(self, loop: LoopState) -> CurriculumState:
        """The run's, which begins with nothing known.

        Raises:
            InputError: a checkpoint brought that of other rows.
        """
        rows, levels = len(self._level_of), len(self._levels)
        if loop.curriculum is None:
            loop.curriculum = CurriculumState(SuccessCounts.none(rows), SuccessCounts.none(levels))
        state = loop.curriculum
        if (len(state.rows.tries), len(state.levels.tries)) != (rows, levels):
            raise InputError(
                f"ckpt_path: the curriculum was made with {len(state.rows.tries)} rows of {len(state.levels.tries)} "
                f"levels, now there are {rows} of {levels}; resume with the same data"
            )
        return state

    def level_rates(self, state: CurriculumState) -> Tensor:
        """Each level's m `[levels]`, float64."""
        return state.levels.rates(0.5, 2.0)

    def rates(self, state: CurriculumState) -> Tensor:
        """Each row's p `[rows]`, float64: how often completions of a row are right, as far as is known."""
        return state.rows.rates(self.level_rates(state)[self._level_of], self.prior)

    def weights(self, state: CurriculumState) -> Tensor:
        """Each row's chance of being drawn first, q normalised, `[rows]` float64."""
        p = self.rates(state)
        q = 4 * p * (1 - p) + self.floor
        return q / q.sum()

    def _row(self, state: CurriculumState, position: int) -> int:
        """The row at a stream position of this rollout; when all have been drawn, they are drawn anew."""
        times, place = divmod(position - state.first, len(self._level_of))
        if self._order[0] is not state or self._order[1] != times:
            u = uniforms([mix_seed(self._seed, _DRAW, state.first, times)], 1, len(self._level_of))[0]
            rings = -torch.log1p(-u) / self.weights(state)
            self._order = (state, times, rings.argsort(stable=True).tolist())
        return self._order[2][place]

    def note(self, prompts: PromptBatch, right: Tensor | None) -> None:
        """Remember for `update` how the completions of this rank's prompts did.

        Args:
            prompts: B of them; those that were not drawn from the dataset count for nothing.
            right: `[B * G]` from 0 to 1, NaN where it is not known.
        """
        if right is None or not len(self._level_of) or not len(prompts.rows):
            return
        right = right.cpu().double().view(len(prompts), -1)
        whose = torch.tensor([prompts.index, list(prompts.rows)], dtype=torch.float64)
        known = ~right.isnan()
        score = torch.where(known, right.clamp(0, 1), 0.0)
        self._noted.append(torch.cat([whose, torch.stack([score.sum(1), known.double().sum(1)])]))

    def update(self, loop: LoopState) -> Cells:
        """Count what was noted on all ranks in this rollout, which ends its draws; returns what is logged of it."""
        if not len(self._level_of):
            return {}
        found = [noted for of_rank in gather_objects(self._noted) for noted in of_rank]
        noted = torch.cat([torch.zeros(4, 0, dtype=torch.float64), *found], 1)
        self._noted, state = [], self._state(loop)
        noted = noted[:, noted[0].argsort()]
        rows = noted[1].long()
        cells = self._cells(state, rows)
        tried = noted[3] > 0
        rows, right, tries = rows[tried], noted[2, tried], noted[3, tried]
        loop.curriculum = CurriculumState(
            state.rows.plus(rows, right, tries, self.decay),
            state.levels.plus(self._level_of[rows], right, tries, self.decay),
            loop.prompts_seen,
        )
        return cells

    def _cells(self, state: CurriculumState, drawn: Tensor) -> Cells:
        """What is logged of a rollout of these rows: the rates are those before it."""
        p, q, (right, tries) = self.rates(state), self.weights(state), (state.rows.right, state.rows.tries)
        found = {
            "success_rate": float(p.mean()),
            "effective_rows": float(torch.exp(-(q * q.log()).sum())),
            "never_right_fraction": float(((right == 0) & (tries > 0)).double().mean()),
            "always_right_fraction": float(((right == tries) & (tries > 0)).double().mean()),
        }
        if len(drawn):
            found["drawn_success_rate"] = float(p[drawn].mean())
        if self.column is not None and len(self._levels) <= _MOST_LEVELS:
            shares = torch.bincount(self._level_of[drawn], minlength=len(self._levels)) / max(len(drawn), 1)
            for name, share, rate in zip(self._levels, shares.tolist(), self.level_rates(state).tolist(), strict=True):
                found |= {f"drawn_fraction_{name}": share, f"success_rate_{name}": rate}
        return {f"curriculum/{name}": (value, None) for name, value in found.items()}

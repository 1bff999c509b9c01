"""The value function's share of an on-policy algorithm: its loss and its settings."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from lit_rlhf.errors import check_choice, check_number
from lit_rlhf.functional import clipped_value_loss
from lit_rlhf.metrics import Cells
from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import Experience


class CriticArgs(TypedDict, total=False):
    """The keyword arguments of `Critic`."""

    value_coef: float
    value_clip: float | str | None
    value_lr: float | None
    bootstrap_truncated: bool


class Critic:
    """The arguments `value_*` of the on-policy algorithms; without effect where `value="none"`.

    Args:
        clip_ratio: the algorithm's.
        value_coef: c_v, weight of the value loss. With a separate model AdamW makes it nearly irrelevant.
        value_clip: eps_v, how far from the rollout's value the new one counts; by default as far as the algorithm's
            `clip_ratio_high`; None for no clip.
        value_lr: learning rate of the value function's own parameters; by default the policy's.
        bootstrap_truncated: a completion that was cut off goes on to earn its last value, instead of ending there.
    """

    def __init__(
        self,
        clip_ratio: float,
        value_coef: float = 0.5,
        value_clip: float | str | None = "clip_ratio",
        value_lr: float | None = None,
        bootstrap_truncated: bool = False,
    ) -> None:
        check_number("algo.value_coef", value_coef, at_least=0)
        if isinstance(value_clip, str):
            check_choice("algo.value_clip", value_clip, ("clip_ratio",))
        else:
            check_number("algo.value_clip", 1.0 if value_clip is None else value_clip, above=0)
        check_number("algo.value_lr", 1.0 if value_lr is None else value_lr, above=0)
        self.clip: float | None = clip_ratio if isinstance(value_clip, str) else value_clip
        self.coef, self.lr, self.bootstraps = value_coef, value_lr, bootstrap_truncated

    def stats(self, scores: Scores, batch: Experience) -> Cells:
        """Tokens whose value has left the clip range about the rollout's."""
        if scores.values is None or batch.values is None or self.clip is None:
            return {}
        outside = (scores.values.detach() - batch.values).abs() > self.clip
        return {"stability/value_clip_fraction": (outside.float(), batch.response_mask)}

    def per_token(self, scores: Scores, batch: Experience) -> Tensor | None:
        """The value loss `[N, T]`; None where there is no value function, or nothing to learn from."""
        if scores.values is None or batch.values is None or batch.returns is None:
            return None
        return clipped_value_loss(scores.values, batch.values, batch.returns, self.clip)

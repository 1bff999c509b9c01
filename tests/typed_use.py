"""A user's script as a type checker sees it: `mypy` reads this file, nothing runs it.

What is right must pass under `strict`, and every `type: ignore` marks a mistake that must be found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf import DAPO, DPO, GRPO, PPO, SamplingConfig, ScoredRollout, register_adv_estimator, register_policy_loss
from lit_rlhf.algorithms.on_policy import OnPolicyArgs
from lit_rlhf.data import ArithmeticData, FileData
from lit_rlhf.functional import group_normalize
from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import Experience


class MedianDAPO(DAPO):
    """A baseline and a term of the loss of its own."""

    def __init__(self, *, strength: float = 1.0, **on_policy: Unpack[OnPolicyArgs]) -> None:
        self.strength = strength
        super().__init__(clip_ratio_high=0.3, **on_policy)

    def compute_advantages(self, rollout: ScoredRollout) -> tuple[Tensor, Tensor | None]:
        """The reward minus the median of the group."""
        groups = rollout.rewards.view(-1, self.group_size)
        return rollout.spread((groups - groups.median(dim=1, keepdim=True).values).flatten()), None

    def compute_loss(self, scores: Scores, batch: Experience) -> dict[str, Tensor]:
        """And a term that pulls log-probs down."""
        return {**super().compute_loss(scores, batch), "own": self.strength * self.aggregate(scores.logprobs, batch)}


@register_adv_estimator("signs")
def signs(rewards: Tensor, mask: Tensor, group_ids: Tensor) -> tuple[Tensor, None]:
    """Better or worse than the mean of the group."""
    return group_normalize(rewards, group_ids).sign(), None


@register_policy_loss("typed_ratio")
def typed_ratio(
    old_logp: Tensor, logp: Tensor, advantages: Tensor, mask: Tensor, **kw: Any
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Without a clip."""
    return -(logp - old_logp).exp() * advantages, {}


def length(completions: list[str], **columns: Any) -> list[float]:
    """A reward."""
    return [float(len(text)) for text in completions]


def main() -> None:
    """Right, then wrong."""
    sampling = SamplingConfig(max_new_tokens=8)
    module = MedianDAPO(policy="tiny", group_size=4, strength=2.0, reward_funcs=[length], sampling=sampling)
    Trainer(max_epochs=1).fit(module, datamodule=ArithmeticData())
    metrics: dict[str, float] = module.pop_metrics()
    size: int = module.group_size
    PPO(value="shared", seed=size, lr=metrics["lr"])
    DPO(beta=0.3, batch_size=4)

    GRPO(group_sise=3)  # type: ignore[call-arg]
    GRPO(kl_in="rewards")  # type: ignore[arg-type]
    DPO(group_size=3)  # type: ignore[call-arg]
    FileData(3)  # type: ignore[arg-type]

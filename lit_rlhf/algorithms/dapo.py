"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization (arXiv 2503.14476, eq. 8).

    J = E[ 1/sum_i|o_i| sum_i sum_t min(r_it A_i, clip(r_it, 1-eps_low, 1+eps_high) A_i) ]
    A_i = (R_i - mean_g R) / std_g R          subject to 0 < #correct in the group < G     (eq. 11)
    R_i = score_i + R_length(|o_i|)           the soft overlong penalty                    (eq. 13)

Four changes to GRPO: clip-higher, dynamic sampling, token-level loss, overlong reward shaping. No KL term.
Departure from the paper: surplus informative groups are kept for the next rollout instead of thrown away,
and when `max_rounds` are used up the batch is completed by groups that weigh nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from lit_rlhf.algorithms.base import LossAggregation
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule
from lit_rlhf.errors import InputError, check_number
from lit_rlhf.functional import overlong_penalty
from lit_rlhf.functional.shaping import add_scores
from lit_rlhf.rollouts.dynamic_sampling import refill
from lit_rlhf.types import PromptBatch, ScoredRollout


class DAPO(OnPolicyModule):
    """Clip-higher, token-level loss, dynamic sampling with bounded refill, soft overlong penalty.

    Choose it when many prompts are always or never solved, or when completions are long.

    Example:
        module = DAPO(policy="tiny", clip_ratio_high=0.3, overlong_buffer=4)

    Args:
        clip_ratio_low: eps_low; the ratio of a bad completion's token is clipped at 1 - eps_low.
        clip_ratio_high: eps_high; the ratio of a good completion's token is clipped at 1 + eps_high.
        kl_coef: weight of a KL term; the paper has none.
        loss_agg: the paper's average over all tokens of the step is `"token-mean"`.
        dynamic_sampling: drop groups of equal raw rewards and sample more prompts instead.
        max_rounds: sampling rounds of one rollout at most, the first included.
        overlong_buffer: L_cache, tokens before `max_new_tokens` over which the penalty grows to -1; 0 is off.
        **on_policy: the arguments of `OnPolicyModule`.
    """

    advantage_estimator = "group_normalize"
    policy_loss = "clip"
    hyper_parameters = ("clip_ratio_low", "clip_ratio_high")
    stats_spec: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **OnPolicyModule.stats_spec,
        "rollout/dynamic_sampling_rounds": ("value",),
        "rollout/filler_fraction": ("value",),
    }

    def __init__(
        self,
        *,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.28,
        kl_coef: float = 0.0,
        loss_agg: LossAggregation = "token-mean",
        dynamic_sampling: bool = True,
        max_rounds: int = 4,
        overlong_buffer: int = 0,
        **on_policy: Unpack[OnPolicyArgs],
    ) -> None:
        self.clip_ratio_low, self.clip_ratio_high = clip_ratio_low, clip_ratio_high
        self.dynamic_sampling, self.max_rounds, self.overlong_buffer = dynamic_sampling, max_rounds, overlong_buffer
        super().__init__(kl_coef=kl_coef, loss_agg=loss_agg, **on_policy)
        check_number("algo.max_rounds", max_rounds, at_least=1)
        if not 0 <= overlong_buffer < self.sampling.max_new_tokens:
            raise InputError(
                f"algo.overlong_buffer={overlong_buffer} must lie between 0 and "
                f"rollout.max_new_tokens={self.sampling.max_new_tokens}"
            )

    def gather(self, prompts: PromptBatch) -> ScoredRollout:
        """Replace groups that teach nothing by samples of further prompts (eq. 11)."""
        rollout = self.sample_recorded(prompts)
        if not self.dynamic_sampling:
            return rollout
        rounds = self.max_rounds if self.prompts is not None else 1
        more = lambda count: self.sample_recorded(self.draw_prompts(count))  # noqa: E731
        filled = refill(rollout, self.loop.carried, more, len(prompts), self.group_size, rounds)
        self.loop.carried = filled.surplus
        self.count(
            {
                "rollout/dynamic_sampling_rounds": (float(filled.rounds), None),
                "rollout/filler_fraction": (filled.filler.float(), None),
            }
        )
        return filled.rollout

    def shape_rewards(self, rollout: ScoredRollout) -> Tensor:
        """Add the soft overlong penalty (eq. 13); the filter above has seen the raw reward."""
        if self.overlong_buffer:
            penalty = overlong_penalty(rollout.lengths, self.sampling.max_new_tokens, self.overlong_buffer)
            rollout = replace(rollout, rewards=add_scores(rollout.rewards, penalty, rollout.response_mask))
        return super().shape_rewards(rollout)

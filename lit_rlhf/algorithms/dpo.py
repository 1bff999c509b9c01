"""DPO: Direct Preference Optimization (arXiv 2305.18290, eq. 7).

    L = -E[ log sigma( beta (h_w - h_l) ) ]        h = sum_t log pi_theta(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)

over pairs of completions y_w, preferred, and y_l of a prompt x; t runs over the completion, EOS included. beta h is the
implicit reward (eq. 5). At the reference every h is 0: the loss is log 2 and no pair is ranked.

`kind` replaces -log sigma: hinge (SLiC, 2305.10425), ipo (2310.12036), robust (2403.00409), see `functional.dpo_loss`.
IPO's h is the mean over the completion's tokens, as its authors recommend, unless `ipo_sum`; its paper has the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import Unpack

from lit_rlhf.algorithms.preference import PreferenceArgs, PreferenceModule
from lit_rlhf.algorithms.preference_stats import Comparison
from lit_rlhf.errors import InputError, check_number
from lit_rlhf.functional import dpo_loss
from lit_rlhf.types import PreferenceBatch

Kind = Literal["sigmoid", "hinge", "ipo", "robust"]


class DPO(PreferenceModule):
    """Raise the log-ratio of the preferred completion over the other one.

    Choose it when there are preference pairs and a policy is wanted, without a reward model and without sampling.

    Example:
        module = DPO(policy="tiny", beta=0.05)

    Args:
        lr: AdamW's peak learning rate; by default `recommended_lr` of the policy's size. The paper has 1e-6.
        beta: how strongly the policy is held to the reference.
        label_smoothing: the share of pairs taken to be labelled the wrong way round, below 0.5: with `kind="sigmoid"`
            conservative DPO, with `"robust"` its unbiased form.
        kind: `"sigmoid"`, `"hinge"`, `"ipo"` or `"robust"`.
        ipo_sum: of `"ipo"`: sum the log-ratios over the tokens instead of averaging them.
        reference_cache: a folder for the reference's log-probs, see `PreferenceModule`; no second model is held then.
        **preference: the arguments of `PreferenceModule`.
    """

    def __init__(
        self,
        *,
        lr: float | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        kind: Kind = "sigmoid",
        ipo_sum: bool = False,
        reference_cache: str | Path | None = None,
        **preference: Unpack[PreferenceArgs],
    ) -> None:
        check_number("algo.beta", beta, above=0)
        if ipo_sum and kind != "ipo":
            raise InputError(f"algo.ipo_sum is of algo.kind=ipo and has no effect with {kind}; leave one of them out")
        try:
            dpo_loss(torch.zeros(1), torch.zeros(1), beta, label_smoothing, kind)
        except ValueError as error:
            raise InputError(f"algo.{error}") from error
        super().__init__(lr=lr, reference=True, reference_cache=reference_cache, **preference)
        self.beta, self.label_smoothing, self.kind = beta, label_smoothing, kind
        self.per_token = kind == "ipo" and not ipo_sum

    def read_pairs(self, batch: Mapping[str, Any]) -> PreferenceBatch:
        """See `PreferenceModule.read_pairs`; a `margin` is refused, as no kind of the loss has one."""
        pairs = super().read_pairs(batch)
        if pairs.margin is not None:
            raise InputError(
                "batch: 'margin' is given and no loss of DPO has one; leave it out, or train RewardModeling with it"
            )
        return pairs

    def compare(self, batch: PreferenceBatch) -> Comparison:
        """The loss of every pair, and its implicit rewards beta h."""
        rows = batch.completions()
        logps = self.models.score(rows).logprobs  # [2N, T], 0 outside of the completions
        h = (logps - self.reference_logprobs(batch)).sum(1)
        if self.per_token:
            h = h / rows.response_mask.sum(1).clamp(min=1)
        (h_w, h_l), (logp_w, logp_l) = h.chunk(2), logps.detach().sum(1).chunk(2)
        loss = dpo_loss(h_w, h_l, self.beta, self.label_smoothing, self.kind)
        also = {"implicit_reward": self.beta * (h_w - h_l), "policy_accuracy": (logp_w > logp_l).float()}
        also |= {"chosen_logps": logp_w, "rejected_logps": logp_l}
        return Comparison(self.beta * h_w, self.beta * h_l, {"dpo_loss": loss}, also)

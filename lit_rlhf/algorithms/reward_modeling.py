"""Reward modelling: the Bradley-Terry model of preferences (Stiennon et al., arXiv 2009.01325).

    P(y_w > y_l) = sigma( (r_w - r_l) / tau )
    L = -E[ log sigma( (r_w - r_l - m) / tau ) ] + c E[ (r_w + r_l)^2 ]

r is a linear function of the policy's last hidden state at the completion's last token, EOS included. The margin m
(Llama 2, 2307.09288) asks for a distance; the centring term (2312.09244, c = 0.01) fixes the constant that the first
term leaves free. The head begins with weights of N(0, 1 / (d + 1)) (2403.17031), and has no bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from typing_extensions import Unpack

from lit_rlhf.algorithms.preference import PreferenceArgs, PreferenceModule
from lit_rlhf.algorithms.preference_stats import Comparison
from lit_rlhf.errors import check_number
from lit_rlhf.functional import bradley_terry_loss
from lit_rlhf.models.adapters import is_adapted, merged
from lit_rlhf.models.wrapper import causal_lm
from lit_rlhf.text import with_own_pad_token
from lit_rlhf.types import PreferenceBatch


class RewardModeling(PreferenceModule):
    """Turn a language model into a judge: a number for a completion, higher for the preferred one.

    The exported model is a sequence-classification model of Transformers with one label, the reward.

    Choose it when there are preference pairs and a reward is wanted, to train with or to rank by.

    Example:
        module = RewardModeling(policy="tiny", center_coef=0.01)

    Args:
        lr: AdamW's peak learning rate; by default 1e-5, and ten times that for LoRA adapters.
        margin: m, by how much the preferred completion should win; a row's own `margin` goes first.
        temperature: tau, of the rewards' difference.
        center_coef: c, weight of the term that centres the rewards on 0; 0 is off, 0.01 the paper's.
        **preference: the arguments of `PreferenceModule`; of the policy the language-modelling head is not trained.
    """

    samples_in_validation = False
    usual_lr = 1e-5
    exports_adapter = False  # the head would be missing
    generates: ClassVar[bool] = False  # it goes on from the trunk of a reward model, too
    stats_spec: ClassVar[Mapping[str, tuple[str, ...]]] = {
        f"preference/{side}_reward": ("mean", "std") for side in ("chosen", "rejected")
    }

    def __init__(
        self,
        *,
        lr: float | None = None,
        margin: float = 0.0,
        temperature: float = 1.0,
        center_coef: float = 0.0,
        **preference: Unpack[PreferenceArgs],
    ) -> None:
        check_number("algo.margin", margin)
        check_number("algo.temperature", temperature, above=0)
        check_number("algo.center_coef", center_coef, at_least=0)
        model = preference["policy"] = causal_lm(preference.get("policy", "tiny"))
        std = 1 / math.sqrt(model.config.get_text_config(decoder=True).hidden_size + 1)
        super().__init__(lr=lr, value="shared", value_std=std, **preference)
        # sequence-classification models find the last token by its not being padding: EOS must not look like it
        self.tokenizer = with_own_pad_token(self.tokenizer, self.encoder.eos_token_ids)
        self.margin, self.temperature, self.center_coef = margin, temperature, center_coef
        trunk = {id(weight) for weight in model.base_model.parameters()}
        for weight in model.parameters():
            if id(weight) not in trunk:
                weight.requires_grad_(False)  # DDP refuses weights that no gradient reaches

    def compare(self, batch: PreferenceBatch) -> Comparison:
        """The rewards of every pair, and its Bradley-Terry and centring losses."""
        r_w, r_l = self.models.score_values(batch.completions()).last.chunk(2)
        losses = {"reward_loss": bradley_terry_loss(r_w, r_l, self.margins(batch), self.temperature)}
        if self.center_coef:
            losses["center_loss"] = self.center_coef * (r_w + r_l).square()
        return Comparison(r_w, r_l, losses)

    def margins(self, batch: PreferenceBatch) -> float | Tensor:
        """Margin of every pair: `[N]` where rows have their own, else one number."""
        own = batch.margin
        return self.margin if own is None else torch.where(own.isnan(), torch.full_like(own, self.margin), own)

    def export_model(self) -> Any:
        """The reward model as `AutoModelForSequenceClassification` loads it.

        It reads rows padded on the right; padded on the left, models with absolute positions want `position_ids` too.
        """
        policy, head = self.models.policy, self.models.value_head
        assert head is not None
        policy = merged(policy) if is_adapted(policy) else policy
        config = type(policy.config).from_dict(policy.config.to_dict())
        config.num_labels, config.pad_token_id = 1, self.tokenizer.pad_token_id
        config.eos_token_id = self.encoder.eos_token_ids  # what ends a completion: `RewardModel` reads it
        model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
        model.base_model.load_state_dict(policy.base_model.state_dict())
        with torch.no_grad():
            model.score.weight.copy_(head.weight)
        return model.eval()

"""lit_rlhf: PyTorch Lightning modules for training language models from feedback.

Public names are imported on first use (PEP 562): `import lit_rlhf` costs no torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "SFT": "lit_rlhf.algorithms.sft",
    "GRPO": "lit_rlhf.algorithms.grpo",
    "DAPO": "lit_rlhf.algorithms.dapo",
    "PPO": "lit_rlhf.algorithms.ppo",
    "ConservativePPO": "lit_rlhf.algorithms.conservative_ppo",
    "DrGRPO": "lit_rlhf.algorithms.dr_grpo",
    "GSPO": "lit_rlhf.algorithms.gspo",
    "RLOO": "lit_rlhf.algorithms.rloo",
    "REINFORCE": "lit_rlhf.algorithms.reinforce",
    "REINFORCEPlusPlus": "lit_rlhf.algorithms.reinforce_pp",
    "ReMax": "lit_rlhf.algorithms.remax",
    "CISPO": "lit_rlhf.algorithms.cispo",
    "ImportanceSampling": "lit_rlhf.algorithms.importance_sampling",
    "DPO": "lit_rlhf.algorithms.dpo",
    "RewardModeling": "lit_rlhf.algorithms.reward_modeling",
    "PreferenceModule": "lit_rlhf.algorithms.preference",
    "OnPolicyModule": "lit_rlhf.algorithms.on_policy",
    "RLHFModule": "lit_rlhf.algorithms.base",
    "PolicyReferenceValue": "lit_rlhf.models.wrapper",
    "SamplingConfig": "lit_rlhf.types",
    "PromptBatch": "lit_rlhf.types",
    "Rollout": "lit_rlhf.types",
    "ScoredRollout": "lit_rlhf.types",
    "Experience": "lit_rlhf.types",
    "PreferenceBatch": "lit_rlhf.types",
    "InputError": "lit_rlhf.errors",
    "register_adv_estimator": "lit_rlhf.registry",
    "register_policy_loss": "lit_rlhf.registry",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from lit_rlhf.algorithms.base import RLHFModule as RLHFModule
    from lit_rlhf.algorithms.cispo import CISPO as CISPO
    from lit_rlhf.algorithms.conservative_ppo import ConservativePPO as ConservativePPO
    from lit_rlhf.algorithms.dapo import DAPO as DAPO
    from lit_rlhf.algorithms.dpo import DPO as DPO
    from lit_rlhf.algorithms.dr_grpo import DrGRPO as DrGRPO
    from lit_rlhf.algorithms.grpo import GRPO as GRPO
    from lit_rlhf.algorithms.gspo import GSPO as GSPO
    from lit_rlhf.algorithms.importance_sampling import ImportanceSampling as ImportanceSampling
    from lit_rlhf.algorithms.on_policy import OnPolicyModule as OnPolicyModule
    from lit_rlhf.algorithms.ppo import PPO as PPO
    from lit_rlhf.algorithms.preference import PreferenceModule as PreferenceModule
    from lit_rlhf.algorithms.reinforce import REINFORCE as REINFORCE
    from lit_rlhf.algorithms.reinforce_pp import REINFORCEPlusPlus as REINFORCEPlusPlus
    from lit_rlhf.algorithms.remax import ReMax as ReMax
    from lit_rlhf.algorithms.reward_modeling import RewardModeling as RewardModeling
    from lit_rlhf.algorithms.rloo import RLOO as RLOO
    from lit_rlhf.algorithms.sft import SFT as SFT
    from lit_rlhf.errors import InputError as InputError
    from lit_rlhf.models.wrapper import PolicyReferenceValue as PolicyReferenceValue
    from lit_rlhf.registry import register_adv_estimator as register_adv_estimator
    from lit_rlhf.registry import register_policy_loss as register_policy_loss
    from lit_rlhf.types import Experience as Experience
    from lit_rlhf.types import PreferenceBatch as PreferenceBatch
    from lit_rlhf.types import PromptBatch as PromptBatch
    from lit_rlhf.types import Rollout as Rollout
    from lit_rlhf.types import SamplingConfig as SamplingConfig
    from lit_rlhf.types import ScoredRollout as ScoredRollout


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    message = f"module 'lit_rlhf' has no attribute {name!r}"
    # `from lit_rlhf import Dapo` first asks whether there is that attribute, and drops what an AttributeError says
    if sys._getframe(1).f_code.co_name == "_handle_fromlist":
        from importlib.util import find_spec

        from lit_rlhf.signatures import nearest

        if find_spec(f"lit_rlhf.{name}") is None:
            raise ImportError(message + nearest(name, _HOMES), name="lit_rlhf")
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Samplers behind one protocol: `RolloutEngine`."""

from lit_rlhf.rollouts.engines.base import RolloutEngine
from lit_rlhf.rollouts.engines.transformers import TransformersEngine

__all__ = ["RolloutEngine", "TransformersEngine"]

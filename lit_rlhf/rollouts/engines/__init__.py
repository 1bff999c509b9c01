"""Samplers behind one protocol: `RolloutEngine`."""

from lit_rlhf.rollouts.engines.base import ClonableEngine, RolloutEngine
from lit_rlhf.rollouts.engines.transformers import TransformersEngine

__all__ = ["ClonableEngine", "RolloutEngine", "TransformersEngine"]

"""Samplers behind one protocol: `RolloutEngine`."""

from lit_rlhf.rollouts.engines.base import (
    ClonableEngine,
    EngineError,
    EngineFactory,
    EngineTimeoutError,
    RolloutEngine,
    close_engine,
    has_exact_logprobs,
)
from lit_rlhf.rollouts.engines.transformers import TransformersEngine
from lit_rlhf.rollouts.engines.vllm import VLLMEngine
from lit_rlhf.rollouts.engines.vllm_server import VLLMServerEngine

__all__ = [
    "ClonableEngine",
    "EngineError",
    "EngineFactory",
    "EngineTimeoutError",
    "RolloutEngine",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "close_engine",
    "has_exact_logprobs",
]

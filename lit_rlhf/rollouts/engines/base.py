"""What a sampler has to offer: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn
from typing_extensions import Self

from lit_rlhf.errors import InputError
from lit_rlhf.types import Rollout, SamplingConfig


class EngineError(InputError):
    """What an engine samples with has failed; the sentence says what and what to do about it."""


class EngineTimeoutError(EngineError):
    """It has not answered in time."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from the weights it was last given."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int | Sequence[int]
    ) -> Rollout:
        """Sample `sampling.group_size` completions of every prompt.

        Args:
            prompt_ids: B lists of token ids, unpadded.
            sampling: how to sample; every argument is applied as it stands.
            seed: one integer for the call, or B of them. A prompt's samples are a function of its own
                seed, whatever else is in the batch; an integer gives prompt i `mix_seed(seed, i)`.

        Returns:
            B * G rows, prompt by prompt, with `group_ids` 0..B-1. The response width is the longest
            response sampled, at most `max_new_tokens`. `behavior_logprobs` are those of the distribution
            sampled from (after temperature, top_k and top_p; greedy: at temperature 1), zero where
            `response_mask` is false.

        Raises:
            InputError: no prompts, an empty prompt, a prompt that does not fit the model, a token id
                outside the vocabulary, a wrong number of seeds, no weights yet, or a model that the
                engine cannot sample from.
        """
        ...

    def update_weights(self, module: nn.Module, version: int) -> None:
        """Sample from `module`'s weights from now on; rollouts carry `version` (see `Rollout.version`)."""
        ...


@runtime_checkable
class ClonableEngine(RolloutEngine, Protocol):
    """An engine that can sample in another thread while this one does something else (`rollout.max_staleness`)."""

    def clone(self) -> Self:
        """Make another engine of the same settings that shares nothing that either changes; it has no weights yet.

        The weights it is given are a module's that nobody trains; they do not change while it samples.
        """
        ...


class EngineFactory(Protocol):
    """What makes an engine, once it is known where completions end: a class of one, or a `functools.partial` of it."""

    def __call__(self, eos_token_ids: Sequence[int], pad_token_id: int) -> RolloutEngine:
        """See `TransformersEngine` for the arguments."""
        ...


def has_exact_logprobs(engine: RolloutEngine) -> bool:
    """Whether the engine's log-probs are those that the policy itself would score, up to rounding in float32.

    An engine of which that is not so, because it computes in other kernels or in another precision, has an attribute
    `exact_logprobs = False`: its rows are scored again and weighed (`algorithms.proximal`, `rollouts.importance`).
    """
    return bool(getattr(engine, "exact_logprobs", True))


def close_engine(engine: RolloutEngine) -> None:
    """End the processes that an engine has started, if it has; it starts them again when it is used again."""
    getattr(engine, "close", lambda: None)()

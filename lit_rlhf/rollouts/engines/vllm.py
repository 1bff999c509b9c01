"""Sampling with vLLM in this process: continuous batching and paged attention in vLLM's own copy of the policy.

vLLM computes in other kernels than the policy that trains, often in another precision, so its log-probs are not exactly
the policy's (`exact_logprobs = False`). What that is good for and what is not promised: docs/vllm.md.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_rlhf.errors import InputError, check_number
from lit_rlhf.models.loading import floating_dtype
from lit_rlhf.ranks import sum_over_ranks
from lit_rlhf.rewards.timeouts import TimedOut, within
from lit_rlhf.rollouts.engines.base import EngineError, EngineTimeoutError
from lit_rlhf.rollouts.engines.prompts import checked_prompts, seed_per_prompt
from lit_rlhf.rollouts.engines.weights import checkpoint_of, fingerprint, write_config
from lit_rlhf.types import Rollout, SamplingConfig, pad_right

T = TypeVar("T")
ENVIRONMENT = {  # where the user has not set it otherwise
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent to vLLM's makers
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without a GPU vLLM would take most of the memory
}
_SAMPLES = 64  # of a request at most: a server refuses more than it samples at a time
_SEEDS = 2**62  # vLLM adds the sample's number to a prompt's seed, a signed integer of 64 bits


@dataclass(frozen=True)
class Sample:
    """One completion: token ids, the end included, and the log-prob of each."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


class VLLMBase(ABC):
    """What the engines that sample with vLLM share: when weights are pushed, what is asked for, what comes back.

    Args:
        eos_token_ids: tokens that end a completion; they belong to it.
        pad_token_id: fills the unused cells.
        stop_token_ids: further tokens that end a completion.
        dtype: of vLLM's weights and arithmetic, `"float32"` or `"bfloat16"`; by default the policy's.
        timeout: seconds that vLLM may take for one call, a whole rollout say.
        options: further arguments of vLLM's own, such as `{"max_model_len": 4096}`.
    """

    exact_logprobs = False

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        stop_token_ids: Sequence[int] = (),
        *,
        dtype: str | None = None,
        timeout: float = 600.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_number("engine.timeout", timeout, above=0)
        self.end_token_ids = sorted({*eos_token_ids, *stop_token_ids})
        self.pad_token_id = pad_token_id
        self.dtype = None if dtype is None else floating_dtype("engine.dtype", dtype)
        self.timeout, self.options = timeout, dict(options or {})
        self.policy: Any = None
        self.version = 0
        self._pushed: tuple[int, list[int]] | None = None

    @abstractmethod
    def _push(self, policy: Any, dtype: torch.dtype) -> None:
        """Give vLLM the policy's weights."""

    @abstractmethod
    def _sample(
        self, prompt_ids: Sequence[Sequence[int]], arguments: Sequence[dict[str, Any]], at_a_time: int
    ) -> list[list[Sample]]:
        """Sample `n` completions of each prompt, by its own `vllm.SamplingParams`; so many prompts at a time."""

    def update_weights(self, module: nn.Module, version: int) -> None:
        """Sample from `module`'s weights from now on. They are pushed where they, or the version, have changed.

        Under several ranks each has to call it.
        """
        policy: Any = getattr(module, "_orig_mod", module)  # of torch.compile
        now = version, fingerprint(policy)
        changed = torch.tensor(float(now != self._pushed), device=next(policy.parameters()).device)
        if bool(sum_over_ranks(changed)):
            self._pushed = None  # of a push that fails nothing is known
            self._push(policy, self.dtype or next(policy.parameters()).dtype)
            self._pushed = now
        self.policy, self.version = policy, version

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int | Sequence[int]
    ) -> Rollout:
        """See `RolloutEngine.generate`. The tensors are on the policy's device.

        A prompt's samples are a function of its seed and the weights as far as vLLM computes the same whatever
        else is in its batch: in the last digits it may not.
        """
        if self.policy is None or self._pushed is None:
            raise InputError("the engine has no weights to sample from: call update_weights(model, version) first")
        ids, mask = checked_prompts(self.policy, prompt_ids, sampling.max_new_tokens, self.pad_token_id)
        seeds, count = seed_per_prompt(seed, len(ids)), 1 if sampling.temperature == 0 else sampling.group_size
        firsts = range(0, count, _SAMPLES)
        asked = [(p, self._arguments(sampling, s, x)) for p, s in zip(prompt_ids, seeds, strict=True) for x in firsts]
        prompts, arguments = ([*x] for x in zip(*asked, strict=True))
        rows = sampling.max_rows or len(ids) * count
        found = self._sample(prompts, arguments, max(1, rows // min(count, _SAMPLES)))
        samples = [sample for group in found for sample in group]
        if count < sampling.group_size:  # vLLM refuses several greedy completions: they are all the same
            samples = [sample for sample in samples for _ in range(sampling.group_size)]
        return self._rollout(ids, mask, samples, sampling.group_size)

    def _arguments(self, sampling: SamplingConfig, seed: int, first: int) -> dict[str, Any]:
        """Of a prompt's samples from `first` on: every argument that changes what is sampled.

        So no default of vLLM's or of the model's ever applies. vLLM adds a sample's place in the request to the seed.
        """
        return {
            "n": 1 if sampling.temperature == 0 else min(sampling.group_size - first, _SAMPLES),
            "seed": seed % _SEEDS + first,
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": 0,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,  # the ends are these, and no others that vLLM finds in the model's files
            "stop_token_ids": self.end_token_ids,
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }

    def _rollout(self, ids: Tensor, mask: Tensor, samples: Sequence[Sample], group_size: int) -> Rollout:
        if broken := [s for s in samples if len(s.token_ids) == 0 or len(s.token_ids) != len(s.logprobs)]:
            raise EngineError(
                f"vLLM returned a completion of {len(broken[0].token_ids)} tokens with {len(broken[0].logprobs)} "
                "log-probs; is it a version other than those that docs/vllm.md names?"
            )
        vocabulary = self.policy.get_input_embeddings().num_embeddings
        if (highest := max(max(s.token_ids) for s in samples)) >= vocabulary:
            raise EngineError(
                f"vLLM sampled token {highest}, and the policy's vocabulary has {vocabulary}; it has another model"
            )
        response, response_mask = pad_right([s.token_ids for s in samples], self.pad_token_id)
        logprobs = torch.zeros(response.shape, dtype=torch.float32)
        logprobs[response_mask] = torch.tensor([x for s in samples for x in s.logprobs], dtype=torch.float32)
        last = torch.tensor([s.token_ids[-1] for s in samples])
        return Rollout(
            prompt_ids=ids.repeat_interleave(group_size, 0),
            prompt_mask=mask.repeat_interleave(group_size, 0),
            response_ids=response,
            response_mask=response_mask,
            behavior_logprobs=logprobs,
            truncated=~torch.isin(last, torch.tensor(self.end_token_ids)),
            group_ids=torch.arange(len(ids)).repeat_interleave(group_size),
            version=torch.full_like(last, self.version),
        ).to(next(self.policy.parameters()).device)


def check_installed(what: str) -> None:
    """Raise an `InputError` where `what` needs the package vllm and it is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"{what} needs the package vllm: pip install 'lit_rlhf[vllm]'")


class VLLMEngine(VLLMBase):
    """A `RolloutEngine` that samples with a `vllm.LLM` in this process: one process, one device.

    Args:
        eos_token_ids: tokens that end a completion; they belong to it.
        pad_token_id: fills the unused cells.
        stop_token_ids: further tokens that end a completion.
        dtype: of vLLM's weights and arithmetic, `"float32"` or `"bfloat16"`; by default the policy's.
        gpu_memory_utilization: share of the GPU's memory that vLLM may take beside the training.
        timeout: seconds that a rollout may take.
        options: further arguments of `vllm.LLM`, such as `{"max_model_len": 4096}`.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        stop_token_ids: Sequence[int] = (),
        *,
        dtype: str | None = None,
        gpu_memory_utilization: float = 0.4,
        timeout: float = 600.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(eos_token_ids, pad_token_id, stop_token_ids, dtype=dtype, timeout=timeout, options=options)
        check_installed("engine=vllm")
        self.gpu_memory_utilization = gpu_memory_utilization
        self._llm: Any = None

    def close(self) -> None:
        """Let go of vLLM's copy of the weights and its cache."""
        self._llm = self._pushed = None

    def _push(self, policy: Any, dtype: torch.dtype) -> None:
        tensors = checkpoint_of(policy, dtype)
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:  # vLLM sets the global seed
            if self._llm is None:
                write_config(policy, Path(folder), dtype)
                self._llm = self._within(lambda: self._start(folder, dtype))
            self._within(lambda: self._load(tensors))

    def _start(self, folder: str, dtype: torch.dtype) -> Any:
        """An LLM of the policy's architecture, without its weights."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError(
                f"engine=vllm samples in a single process and there are {dist.get_world_size()}; write "
                "engine=vllm_server, whose servers all of them share"
            )
        for name, value in {**ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR"}.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over as they are, not sent
        from vllm import LLM

        arguments = {
            "model": folder,
            "dtype": str(dtype).removeprefix("torch."),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "gpu_memory_utilization": self.gpu_memory_utilization,
        }
        return LLM(**{**arguments, **self.options})

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache of the old weights is in use")

    def _sample(
        self, prompt_ids: Sequence[Sequence[int]], arguments: Sequence[dict[str, Any]], at_a_time: int
    ) -> list[list[Sample]]:
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        params = [SamplingParams(**named) for named in arguments]

        def sample() -> list[Any]:
            parts = [slice(first, first + at_a_time) for first in range(0, len(asked), at_a_time)]
            return [x for part in parts for x in self._llm.generate(asked[part], params[part], use_tqdm=False)]

        return [[_sample_of(output) for output in answer.outputs] for answer in self._within(sample)]

    def _within(self, call: Callable[[], T]) -> T:
        """What vLLM returns; whatever it raises is one sentence, and it starts anew the next time."""
        try:
            # Lightning validates in inference mode, and weights that vLLM makes there cannot be changed outside of it.
            with torch.inference_mode(False), torch.no_grad():
                return within(self.timeout, call)
        except InputError:
            raise
        except TimedOut:
            self.close()
            raise EngineTimeoutError(
                f"vLLM has not answered within engine.timeout={self.timeout:g} seconds; raise it or sample less"
            ) from None
        except Exception as error:
            self.close()
            reason = " ".join(str(error).split())[:300]
            raise EngineError(f"vLLM has failed ({type(error).__name__}: {reason}); see docs/vllm.md") from error


def _sample_of(output: Any) -> Sample:
    """A `vllm.CompletionOutput`, whose log-probs are a dictionary by token id for each token."""
    ids = list(output.token_ids)
    return Sample(ids, [found[token].logprob for found, token in zip(output.logprobs, ids, strict=True)])

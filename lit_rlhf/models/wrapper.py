"""The models that an algorithm trains with, behind one object: policy, reference and value function."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Self

from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import check_reference, is_adapted, shared_weights, unwrapped, without_adapters
from lit_rlhf.models.forward import Shortcuts
from lit_rlhf.models.heads import ScalarHead
from lit_rlhf.models.loading import disable_dropout, load_causal_lm, load_tokenizer, prepare_tokenizer, vocabulary_size
from lit_rlhf.models.output_layer import continues_from_cache, output_layer
from lit_rlhf.models.parallel import Blank, shard
from lit_rlhf.models.scoring import Scores, Values, score, score_values
from lit_rlhf.types import CompletionBatch, Rollout

ValueKind = Literal["none", "shared", "separate"]
_LARGEST_PADDING = 127  # embeddings are padded to a multiple of 64 or 128


class PolicyReferenceValue(nn.Module):
    """Policy, frozen reference and value function of one training run.

    Args:
        policy: any Hugging Face causal language model, with adapters or without, a `peft.PeftModel`, or the name or
            path of a model. Its dropout is set to 0.
        reference: have one: a frozen copy of the policy as it is now, or, of a policy with adapters, the policy without
            them. Otherwise no second model is held.
        value: `"none"`; `"shared"`, a head on the policy's own hidden states; or `"separate"`, a copy of the policy's
            trunk with a head. Of a policy with adapters the copy is of the adapters; they share the frozen weights.
        value_std: of the head's initial weights; 0 begins with a value of 0 everywhere.

    The reference stays in eval mode and without gradients whatever Lightning or a caller does.
    """

    def __init__(
        self,
        policy: nn.Module | str | Path,
        *,
        reference: bool = False,
        value: ValueKind = "none",
        value_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.shortcuts = Shortcuts()
        self.policy: Any = causal_lm(policy)
        self.policy.train()
        self.has_reference = reference
        self.reference: Any = None  # the model that serves as reference alone
        if reference:
            check_reference(self.policy)
        if reference and not is_adapted(self.policy):
            self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.value_trunk: Any = _trunk_of(self.policy) if value == "separate" else None
        self.value_head: ScalarHead | None = None if value == "none" else ScalarHead(self.policy, value_std)
        self._blanks: dict[str, Blank] = {}  # of a sharded run: what `gathered` fills

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of everything but the reference."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def shard(self, mesh: DeviceMesh | None) -> None:
        """Hold every weight in shards from now on, one on each rank of the mesh; see `models.parallel`. Once.

        Without a mesh be ready for DeepSpeed to do it.
        """
        if self._blanks:
            return
        for model in (self.policy, self.reference):
            if model is not None:
                output_layer(model)  # it looks with a pass of its own
        parts = {"policy": self.policy, "value_head": self.value_head}
        self._blanks = {name: Blank(part) for name, part in parts.items() if part is not None}
        if mesh is not None:
            shard(self, mesh)

    @contextmanager
    def gathered(self, device: str | None = None, keep: bool = True) -> Iterator[None]:
        """Inside, `policy` and `value_head` of a sharded run are plain modules with all of their weights.

        For sampling and export; training and scoring go on outside. Every rank has to enter.

        Args:
            device: where to hold the weights; by default where the shards are.
            keep: whether this rank needs them, too.
        """
        sharded = {name: getattr(self, name) for name in self._blanks}
        with ExitStack() as stack:
            for name, blank in self._blanks.items():
                plain = stack.enter_context(blank.filled(sharded[name], device, keep))
                stack.callback(setattr, self, name, sharded[name])
                setattr(self, name, plain)
            yield

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt that several rows have is read once for them."""
        share = self.shortcuts.share_prompts and not self.shortcuts.torch_compile
        return share and continues_from_cache(self.policy.base_model)

    @property
    def value_parameters(self) -> list[nn.Parameter]:
        """Parameters that serve the value function alone."""
        owners = [m for m in (self.value_trunk, self.value_head) if m is not None]
        return [p for m in owners for p in m.parameters() if p.requires_grad]

    def score(
        self,
        rows: Rollout | CompletionBatch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        entropy_gradient: bool = True,
        exact_kl: bool = False,
        values: bool = False,
    ) -> Scores:
        """Log-probs `[N, T]` of the rows' completions under the policy, with gradient; see `scoring.score`.

        Args:
            rows: N prompts and completions.
            temperature: the sampling temperature.
            entropy: also the entropy.
            entropy_gradient: with its gradient.
            exact_kl: also the KL to the reference, summed over the vocabulary.
            values: also the value function; a shared one reads the same forward pass.
        """
        reference = self._reference() if exact_kl else None
        head = self.value_head if values and self.value_trunk is None else None
        scores = score(
            self.policy,
            rows,
            temperature=temperature,
            entropy=entropy,
            entropy_gradient=entropy_gradient,
            reference=reference,
            head=head,
            shortcuts=self.shortcuts,
        )
        if values and head is None:
            scores = scores._replace(values=self._values(rows).values)
        return scores

    @torch.no_grad()
    def score_reference(self, rows: Rollout | CompletionBatch, *, temperature: float = 1.0) -> Scores:
        """Log-probs `[N, T]` of the rows' completions under the frozen reference."""
        reference = self._reference()
        with without_adapters(reference):
            return score(reference, rows, temperature=temperature, shortcuts=self.shortcuts)

    def score_values(self, rows: Rollout | CompletionBatch) -> Values:
        """The value function before each token `[N, T]` and after the last one `[N]`, with gradient."""
        return self._values(rows)

    def _values(self, rows: Rollout | CompletionBatch) -> Values:
        if self.value_head is None:
            raise RuntimeError("there is no value function; build PolicyReferenceValue(..., value='shared')")
        trunk = self.policy.base_model if self.value_trunk is None else self.value_trunk
        return score_values(trunk, self.value_head, rows, self.shortcuts)

    def _reference(self) -> nn.Module:
        if not self.has_reference:
            raise RuntimeError("there is no reference model; build PolicyReferenceValue(..., reference=True)")
        reference: nn.Module = self.policy if self.reference is None else self.reference
        return reference


def causal_lm(policy: nn.Module | str | Path) -> Any:
    """The Hugging Face model that a user gave, or the name or path of, with every dropout set to 0.

    Raises:
        InputError: it cannot be loaded, or its adapters cannot be trained.
    """
    return disable_dropout(unwrapped(policy)) if isinstance(policy, nn.Module) else load_causal_lm(policy)


def _trunk_of(policy: Any) -> Any:
    """A copy of the policy's trunk; what adapters leave frozen is shared instead of copied."""
    return copy.deepcopy(policy.base_model, shared_weights(policy))


def tokenizer_for(policy: nn.Module | str | Path, tokenizer: Any = None) -> Any:
    """The tokenizer given, or loaded by name or path, or the policy's own; with EOS, a pad token, padding on the left.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    if tokenizer is None:
        tokenizer = policy if not isinstance(policy, nn.Module) else getattr(policy, "name_or_path", "")
    if tokenizer == "":
        raise InputError(
            "tokenizer: the policy was not loaded from anywhere and has none of its own; give tokenizer=..., a folder, "
            "a Hub name or 'tiny'"
        )
    found = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else prepare_tokenizer(tokenizer)
    if tokenizer is not policy:
        _check_vocabulary(policy, found)
    return found


def _check_vocabulary(policy: nn.Module | str | Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that is clearly not the policy's: ids would be read, or sampled, that mean nothing."""
    size = vocabulary_size(policy)
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else size
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if max(end, pad) < size <= max(2 * known, known + _LARGEST_PADDING):
        return
    raise InputError(
        f"tokenizer: it has {known} tokens, EOS is {end}, padding {pad}, and the model's vocabulary has {size}: "
        "give the model's own tokenizer, or resize the model's embeddings"
    )

"""Reward models: sequence classification with one label, called like any reward function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoTokenizer

from lit_rlhf.errors import InputError, check_number
from lit_rlhf.models.checks import check_one_label
from lit_rlhf.models.loading import (
    floating_dtype,
    from_pretrained,
    load_reward_model,
    max_positions,
    with_declared,
)
from lit_rlhf.models.parallel import is_sharded, shard_frozen
from lit_rlhf.ranks import most_over_ranks
from lit_rlhf.rewards.calling import answer
from lit_rlhf.text import encode_completions, encode_prompts, with_own_pad_token
from lit_rlhf.types import pad_right


class RewardModel:
    """A reward model as a reward function: the logit of a prompt with its completion and EOS.

    The model reads what `RewardModeling` trains on: the ids of the prompt and those of the completion are joined, with
    its own tokenizer and, where prompts are chat messages, its own chat template. It is always in eval mode and without
    gradients, outside of the trainer's autocast, and belongs to no checkpoint. A completion ends with the tokenizer's
    EOS or with what `config.eos_token_id` declares, one id or several, and EOS is added where none of them stands: a
    template that closes turns with yet another token wants it declared. The padding token is none of them, since the
    reward is read at the end. A model object of yours is changed: frozen, in eval mode, `config.pad_token_id` set.

    Args:
        model: a sequence-classification model of Transformers with `num_labels=1`, its folder or its Hub name.
        tokenizer: its tokenizer, or the name or path of one; by default the model's own.
        dtype: what it computes in; by default the dtype it was saved in.
        batch_size: rows of one forward pass; rows of similar length are put together.
        trust_remote_code: run the Python files of the model's repository. Off unless you ask.

    Attributes:
        __name__: what its rewards are logged as: the last part of the path, or `"reward_model"` without one and for the
            `model/` of a run.

    Raises:
        InputError: the model cannot be loaded or has not exactly one label, or there is no tokenizer for it.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: Any = None,
        dtype: str | None = None,
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> None:
        check_number("reward model: batch_size", batch_size, at_least=1)
        if isinstance(model, nn.Module):
            check_one_label(getattr(model, "config", None), type(model).__name__)
            self.model: Any = model
            if dtype is not None:
                self.model = self.model.to(floating_dtype("reward model: dtype", dtype))
        else:
            self.model = load_reward_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        self.path = str(getattr(model, "name_or_path", "") if isinstance(model, nn.Module) else model)
        name = Path(self.path).name
        self.__name__ = name if name not in ("", "model") else "reward_model"
        own = self._tokenizer_of(tokenizer, trust_remote_code)
        sep = getattr(own, "sep_token_id", None)  # what a text ends with for encoders
        ends = with_declared(sep if own.eos_token_id is None else own.eos_token_id, self.model.config.get_text_config())
        self._ends = [end for end in ends if end is not None] or None
        self.tokenizer = with_own_pad_token(own, self._ends or ())
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model.requires_grad_(False).eval()
        self.batch_size = batch_size

    def _tokenizer_of(self, tokenizer: Any, trust_remote_code: bool) -> Any:
        name = self.path if tokenizer is None else tokenizer
        if not isinstance(name, str | Path):
            return tokenizer
        if not str(name):
            raise InputError(
                "reward model: the model was not loaded from anywhere and has no tokenizer of its own; give "
                "RewardModel(model, tokenizer=...)"
            )
        return from_pretrained(AutoTokenizer, "reward model", name, trust_remote_code=trust_remote_code)

    def to(self, device: torch.device | str) -> RewardModel:
        """Move the model to `device`."""
        self.model.to(device)
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """Hold the model in shards over the ranks of the mesh, which then have to call this together. Once."""
        if not is_sharded(self.model):
            shard_frozen(self.model, mesh)

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Raise an `InputError` for what is known to be refused before anything is sampled: see `encode`."""
        chats = any(not isinstance(prompt, str) for prompt in prompts)
        if chats and not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"reward model {self.__name__}: prompts are chat messages, and its tokenizer has no chat template; set "
                "tokenizer.chat_template, or give plain texts"
            )
        self.encode(prompts, [answer(prompt, "") for prompt in prompts])

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """The reward of each of the N completions."""
        rows = self.encode(prompts, completions)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        rewards = [0.0] * len(rows)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if is_sharded(self.model):  # its passes are collectives
            for _ in range(most_over_ranks(len(batches), self.model.device) - len(batches)):
                self._rewards([[0]])
        for batch in batches:
            for i, reward in zip(batch, self._rewards([rows[i] for i in batch]).tolist(), strict=True):
                rewards[i] = reward
        return rewards

    def encode(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[list[int]]:
        """Token ids of each prompt and its completion, EOS included.

        Raises:
            InputError: they are longer than the model's context, or chat messages without a chat template.
        """
        starts = encode_prompts(self.tokenizer, prompts)
        ends = encode_completions(self.tokenizer, completions, self._ends, prompts)
        rows = [start + end for start, end in zip(starts, ends, strict=True)]
        longest, limit = max(map(len, rows), default=0), max_positions(self.model)
        if limit is not None and longest > limit:
            raise InputError(
                f"reward model {self.__name__} reads at most {limit} tokens, and a prompt with its completion has "
                f"{longest}; lower rollout.max_new_tokens, leave long prompts out or take another model"
            )
        return rows

    @torch.no_grad()
    def _rewards(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The logits `[n]` of rows, padded on the right."""
        device = self.model.device
        ids, mask = (x.to(device) for x in pad_right(rows, self.tokenizer.pad_token_id))
        self.model.eval()
        with torch.autocast(device.type, enabled=False):
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).logits
        return logits[:, 0].float()

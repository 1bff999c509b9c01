"""A language model as a trunk and an output layer, where that is all there is to it."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lit_rlhf.models.parallel import in_zero3, is_sharded

_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The linear layer whose outputs on `model.base_model`'s last hidden states are the model's logits, if there is.

    There is none in models that scale or cap their logits, that carry hooks, or adapters on the output layer, or that
    are compiled as a whole or held by DeepSpeed. The model is run once, on a few tokens, to see.
    """
    if not isinstance(model, PreTrainedModel) or in_zero3(model):
        return None
    head = model.get_output_embeddings()
    hooks = (m._forward_hooks or m._forward_pre_hooks for m in (model, head))
    if type(head) is not nn.Linear or any(hooks) or "forward" in vars(model) or model._compiled_call_impl is not None:
        return None
    if model not in _found:
        _found[model] = _is_all(model, head)
    return head if _found[model] else None


@torch.no_grad()
def _is_all(model: Any, head: nn.Linear) -> bool:
    """Whether the head's inputs are the trunk's outputs, and the logits are the head's outputs, untouched."""
    states: list[Tensor] = []
    hooks = [
        model.base_model.register_forward_hook(lambda _, __, out: states.append(out[0])),
        head.register_forward_hook(lambda _, inputs, out: states.extend([inputs[0], out.clone()])),
    ]
    tokens = torch.arange(min(8, head.out_features), device=head.weight.device).unsqueeze(0)
    try:
        logits = model(input_ids=tokens).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(states) != 3:
        return False
    hidden, read, written = states
    return torch.equal(hidden, read) and torch.equal(logits, written)


def continues_from_cache(trunk: nn.Module) -> bool:
    """Whether several tokens can be read, with gradient, behind a prompt whose keys and values are all that it left.

    Not behind a sharded trunk's: passes would be of two kinds, and each rank's prompts decide how many there are.
    """
    if not isinstance(trunk, PreTrainedModel) or trunk.base_model is not trunk or is_sharded(trunk):
        return False
    if trunk.training and any(getattr(m, "gradient_checkpointing", False) for m in trunk.modules()):
        return False  # Transformers keeps no cache then
    named = inspect.signature(trunk.forward).parameters
    layers = DynamicCache(config=trunk.config).layers
    return "past_key_values" in named and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

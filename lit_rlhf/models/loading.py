"""Load causal language models and their tokenizers, and build the tiny one that ships with the package."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from lit_rlhf.errors import InputError
from lit_rlhf.hub import offline_unless_reached
from lit_rlhf.models.adapters import LoRA, adapter_parameters, add_lora, base_of, is_adapted
from lit_rlhf.models.checks import check_finite, check_one_label, check_whole

TINY = "tiny"
ASSETS = Path(__file__).resolve().parents[1] / "assets"


def resolve(path: str | Path) -> str:
    """Turn `"tiny"` into the folder of the shipped base model; anything else is returned as it is."""
    return str(ASSETS / "tiny_base") if str(path) == TINY else str(path)


def load_causal_lm(
    path: str | Path = TINY,
    *,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    lora: LoRA | Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Load a causal language model with every dropout set to 0, so that scoring repeats exactly.

    Args:
        path: a folder, a Hub name, or `"tiny"` for the model that ships with the package. Of the folder of an adapter,
            which says where its base is, the adapter is trained further.
        dtype: a torch dtype name, `"float32"` or `"bfloat16"`.
        attn_implementation: passed to Transformers: `"sdpa"`, `"eager"`, `"flash_attention_2"`.
        trust_remote_code: run the Python files of the model's repository. Off unless you ask.
        lora: train adapters of these settings, `{"r": 16}` say, instead of the model's own weights.
        gradient_checkpointing: keep each layer's input alone for the backward pass and compute the rest again: far less
            memory for a third more time. Prompts that rows share are then read once per row.

    Raises:
        InputError: the model cannot be found or read, or the adapters cannot be added.
    """
    model, info = from_pretrained(
        AutoModelForCausalLM,
        "model.path",
        path,
        dtype=floating_dtype("model.dtype", dtype),
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    check_whole(model, info, "model.path", path)
    check_finite(model, "model.path", path)
    if is_adapted(model):
        if lora is not None:
            raise InputError(f"model.lora: {path} is an adapter already; leave model.lora out to train it further")
        for parameter in adapter_parameters(model):
            parameter.requires_grad_(True)  # Transformers loads them frozen
    elif lora is not None:
        add_lora(model, LoRA.from_mapping(lora))
    if gradient_checkpointing:
        checkpoint_activations(model)
    return disable_dropout(model)


def checkpoint_activations(model: Any) -> None:
    """Compute the activations of every layer again in the backward pass, instead of keeping them.

    Raises:
        InputError: the model cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(f"model.gradient_checkpointing: {type(model).__name__} has none; leave it out")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def load_reward_model(
    path: str | Path, *, dtype: str | torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Load a sequence-classification model with one label, whose logit is the reward.

    Args:
        path: a folder or a Hub name.
        dtype: a floating-point dtype of torch, or its name; by default the one it was saved in.
        trust_remote_code: run the Python files of the model's repository. Off unless you ask.

    Raises:
        InputError: the model cannot be found or read, has not exactly one label, or was saved without its head.
    """
    key, kwargs = "reward model", {"trust_remote_code": trust_remote_code}
    chosen = "auto" if dtype is None else floating_dtype("reward model: dtype", dtype)
    check_one_label(from_pretrained(AutoConfig, key, path, **kwargs), str(path))
    model, info = from_pretrained(
        AutoModelForSequenceClassification, key, path, dtype=chosen, output_loading_info=True, **kwargs
    )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{key}: {path} has no weights for {missing[0]}, and a head that nobody trained judges at random; give a "
            "trained reward model, such as the model/ folder of a run with algo=reward_modeling"
        )
    check_finite(model, key, path)
    return disable_dropout(model)


def floating_dtype(key: str, dtype: str | torch.dtype) -> torch.dtype:
    """The floating-point dtype of torch that the argument `key` names, or an `InputError`."""
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"{key}: {dtype!r} is no floating-point dtype of torch; use 'float32' or 'bfloat16'")
    return found


def load_tokenizer(path: str | Path = TINY, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model, padding on the left, with a pad token.

    Raises:
        InputError: no tokenizer there, or one without an end-of-sequence token.
    """
    tokenizer = from_pretrained(AutoTokenizer, "tokenizer", path, trust_remote_code=trust_remote_code)
    return prepare_tokenizer(tokenizer, str(path))


def prepare_tokenizer(tokenizer: Any, name: str = "") -> Any:
    """The tokenizer, or a copy of it that pads on the left and has a pad token where it has not.

    Raises:
        InputError: it has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        name = name or getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InputError(
            f"the tokenizer of {name} has no end-of-sequence token; set tokenizer.eos_token before training"
        )
    if tokenizer.pad_token_id is not None and getattr(tokenizer, "padding_side", "left") == "left":
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)  # the caller's own stays as it is
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def tiny_llama(
    vocab_size: int = 24,
    *,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    max_length: int = 128,
    pad_token_id: int = 0,
    eos_token_id: int = 1,
    seed: int = 0,
) -> nn.Module:
    """A randomly initialised Llama small enough for a laptop: 0.8 million parameters by default."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model


def disable_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout probability of `model` to 0, in place.

    With dropout the policy that samples, the one that scores and the one that learns would differ, and the
    ratio of a fresh sample would not be 1.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
    return model


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS first, then those that the model's generation settings declare."""
    return with_declared(tokenizer.eos_token_id, getattr(model, "generation_config", None))


def with_declared(end: int | None, config: Any) -> list[Any]:
    """The end, then those that `config.eos_token_id` declares, which is one id, several or none."""
    declared = getattr(config, "eos_token_id", None)
    return list(dict.fromkeys([end, *([declared] if isinstance(declared, int) else declared or [])]))


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model can read, or `None` where its configuration does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def vocabulary_size(model: nn.Module | str | Path) -> int:
    """Token ids that a model, or the model of that name or path, can read."""
    if isinstance(model, nn.Module):
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        return int(embeddings.num_embeddings)
    config = from_pretrained(AutoConfig, "model.path", base_of(resolve(model)), trust_remote_code=False)
    return int(config.get_text_config(decoder=True).vocab_size)


def from_pretrained(auto: Any, key: str, path: str | Path, **kwargs: Any) -> Any:
    """Load what the argument `key` names; whatever is wrong with the files is one sentence about that argument.

    Raises:
        InputError: the folder is missing, incomplete, or holds a pickle that could run code.
    """
    source = resolve(path)
    folder = Path(source).expanduser()
    or_name = " or a Hub name" if key.startswith("reward") else ", a Hub name or 'tiny'"
    if folder.is_dir():
        source = str(folder)
    elif folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise InputError(f"{key}: there is no folder {path}; give a model folder{or_name}")
    try:
        with nullcontext() if folder.is_dir() else offline_unless_reached():
            return auto.from_pretrained(source, **kwargs)
    except UnpicklingError as error:
        raise InputError(
            f"{key}: the weights in {path} are a pickle of more than tensors, which could run code and is not read; "
            "give a model saved as .safetensors"
        ) from error
    except Exception as error:  # broken files end in errors of safetensors, torch, json, huggingface_hub, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise InputError(
            f"{key}: cannot load {str(path)!r} ({type(error).__name__}: {reason}); "
            f"give a complete model folder{or_name}"
        ) from error

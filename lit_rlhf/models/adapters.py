"""LoRA (Hu et al., arXiv 2106.09685): train small adapters beside frozen weights; without them the model is the base.

    W x + (alpha / r) B A x        A: [r, in], random; B: [out, r], 0 to begin with

The adapters are put into the Hugging Face model itself, by the package peft, so that its class, its configuration and
its forward pass stay what they are. The reference of a run is the same model with its adapters off: no second copy.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_rlhf.errors import InputError, check_number
from lit_rlhf.models.modes import eval_mode
from lit_rlhf.signatures import nearest

ALL_LINEAR = "all-linear"
_CONFIG = "adapter_config.json"  # in the folder of an adapter


@dataclass(frozen=True)
class LoRA:
    """Settings of the adapters that `load_causal_lm` adds to a model.

    Args:
        r: rank of the adapters.
        alpha: their outputs are multiplied by alpha / r; 2 r by default.
        target_modules: the layers that get one, by the last part of their names, such as `["q_proj", "v_proj"]`;
            `"all-linear"` for every linear layer but the output embedding.
    """

    r: int = 16
    alpha: float | None = None
    target_modules: str | Sequence[str] = ALL_LINEAR

    def __post_init__(self) -> None:
        check_number("model.lora.r", self.r, at_least=1)
        check_number("model.lora.alpha", 1.0 if self.alpha is None else self.alpha, above=0)

    @classmethod
    def from_mapping(cls, given: Any) -> LoRA:
        """The settings that a mapping of them, as the command line hands over, describes.

        Raises:
            InputError: it is no mapping, or has a key that there is not.
        """
        if isinstance(given, LoRA):
            return given
        if not hasattr(given, "keys"):
            raise InputError(f"model.lora={given!r} is no set of settings; write model.lora.r={LoRA.r}")
        known = [f.name for f in fields(cls)]
        unknown = [str(name) for name in given if name not in known]
        if unknown:
            raise InputError(f"unknown key 'model.lora.{unknown[0]}'{nearest(unknown[0], known)}")
        return cls(**given)


def add_lora(model: Any, lora: LoRA) -> None:
    """Put trainable adapters into the model, in place, in float32 at least, and freeze everything else.

    Raises:
        InputError: there is no such layer, or one whose weights are also the input embedding's; peft is missing.
    """
    config_class, cast = _peft()
    targets = _targets(model, lora.target_modules)
    conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    alpha = 2 * lora.r if lora.alpha is None else lora.alpha
    config = config_class(
        r=lora.r, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=conv1d, task_type="CAUSAL_LM"
    )
    model.add_adapter(config)
    cast(model, "default")  # steps of a usual size would vanish in bfloat16's rounding


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return hasattr(model, "peft_config")


def unwrapped(model: Any) -> Any:
    """The Hugging Face model, with its adapters in it, of what may be a `peft.PeftModel` of the user's.

    Raises:
        InputError: adapters that are no layers of the model, several at a time, or none that trains.
    """
    if not is_adapted(model):
        return model
    kinds = {str(config.peft_type.value) for config in model.peft_config.values()}
    if any(config.is_prompt_learning or config.is_adaption_prompt for config in model.peft_config.values()):
        raise InputError(f"policy: adapters of the kind {', '.join(kinds)} are no layers of the model; use LoRA")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.peft_config = model.peft_config
    active_adapter(inner)
    if not any(p.requires_grad for p in adapter_parameters(inner)):
        raise InputError("policy: its adapter was loaded frozen; load it with is_trainable=True")
    return inner


def active_adapter(model: Any) -> str:
    """Name of the one adapter that is in use.

    Raises:
        InputError: none is in use, or several are.
    """
    active = {name for layer in _layers(model) for name in layer.active_adapters}
    if len(active) != 1:
        names = ", ".join(sorted(active)) or "none"
        raise InputError(f"policy: one of its adapters has to be active, got {names}; call set_adapter with one")
    return str(next(iter(active)))


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the adapters consist of; none of a model without."""
    if not is_adapted(model):
        return []
    owners = [getattr(layer, name) for layer in _layers(model) for name in layer.adapter_layer_names]
    return [p for owner in owners for p in owner.parameters()]


def shared_weights(model: nn.Module) -> dict[int, nn.Parameter]:
    """What a copy of a model with adapters shares with it, the frozen weights, as `copy.deepcopy` takes it."""
    frozen = [p for p in model.parameters() if not p.requires_grad] if is_adapted(model) else []
    return {id(p): p for p in frozen}


def base_size(model: nn.Module) -> int:
    """Number of the model's parameters, its adapters' not counted."""
    adapters = {id(p) for p in adapter_parameters(model)}
    return sum(p.numel() for p in model.parameters() if id(p) not in adapters)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the model without its adapters, in their own shapes, named as in a model without any."""
    adapters = {id(p) for p in adapter_parameters(model)}
    theirs = {name for name, p in model.named_parameters() if id(p) in adapters}
    return {name.replace(".base_layer.", "."): x for name, x in model.state_dict().items() if name not in theirs}


def lora_settings(model: Any) -> str:
    """The adapters' settings, as one would write `model.lora` on the command line."""
    if not is_adapted(model):
        return "null"
    config = model.peft_config[active_adapter(model)]
    return f"{{r: {getattr(config, 'r', None)}, alpha: {getattr(config, 'lora_alpha', None)}}}"


def check_reference(model: nn.Module) -> None:
    """Refuse adapters without which the model is no fixed reference; warn of adapters that have left it already.

    Raises:
        InputError: weights outside of the adapters are trained.
    """
    if not is_adapted(model):
        return
    adapters = {id(p) for p in adapter_parameters(model)}
    moving = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]
    if moving:
        raise InputError(
            f"policy: {len(moving)} weights outside of its adapters train, such as {moving[0]}, so that the model "
            "without adapters is no fixed reference; freeze them"
        )
    if any(bool(p.any()) for layer in _layers(model) for p in getattr(layer, "lora_B", nn.Module()).parameters()):
        warnings.warn(
            "the policy's adapters have been trained already, and the reference is the model without them; merge them "
            "first to have the policy as it is now for the reference",
            stacklevel=6,
        )


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let a model compute as if it had no adapters, in eval mode; afterwards, whatever happens, all is as before."""
    layers = _layers(model) if is_adapted(model) else []
    trains = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        with eval_mode(model) if layers else nullcontext():
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trains:  # peft switches gradients off and on as well
            parameter.requires_grad_(flag)


def merged(model: Any) -> Any:
    """A copy on the CPU with the adapters added to the weights: the original architecture. The model stays as it is."""
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
    memo: dict[int, Any] = {key: _on_cpu(x) for key, x in tensors.items()}
    plain: Any = copy.deepcopy(model, memo)
    inside = [name for name, layer in plain.named_modules() if layer in set(_layers(plain))]
    for name in inside:
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue  # goes with the layer that it is inside of
        layer, (parent, _, child) = plain.get_submodule(name), name.rpartition(".")
        if hasattr(layer, "unload_and_optionally_merge_module"):
            bare = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            layer.merge(safe_merge=True)
            bare = layer.get_base_layer()
        setattr(plain.get_submodule(parent), child, bare)
    del plain.peft_config
    plain._hf_peft_config_loaded = False
    return plain.requires_grad_(True)


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the adapter as `peft.PeftModel.from_pretrained(base, folder)` loads it, with the name of its base."""
    from peft.functional import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = active_adapter(model)
    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {f"base_model.model.{key}": x.detach().cpu().contiguous() for key, x in found.items()}
    config = copy.copy(model.peft_config[name])
    base = Path(model.name_or_path)
    config.base_model_name_or_path = str(base.resolve()) if base.is_dir() else model.name_or_path
    config.inference_mode = True
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def base_of(path: str) -> str:
    """What the adapter of the folder `path` was trained beside; of any other folder or name, itself.

    Raises:
        InputError: the folder does not say what its adapter belongs to.
    """
    config = Path(path).expanduser() / _CONFIG
    if not config.is_file():
        return path
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"model.path: {config} does not say what it is an adapter of; give another folder") from error


def _peft() -> tuple[Any, Any]:
    try:
        from peft import LoraConfig
        from peft.functional import cast_adapter_dtype
    except ImportError:
        raise InputError("model.lora needs the package peft: pip install 'lit_rlhf[peft]'") from None
    return LoraConfig, cast_adapter_dtype


def _targets(model: Any, wanted: str | Sequence[str]) -> str | list[str]:
    """What peft is to be given for `target_modules`, after a look at what the model has."""
    output = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not output]
    if not linear:
        raise InputError(f"model.lora: {type(model).__name__} has no linear layers to put adapters beside")
    if wanted == ALL_LINEAR:
        return ALL_LINEAR
    names = [wanted] if isinstance(wanted, str) else [str(name) for name in wanted]
    if not names:
        raise InputError("model.lora.target_modules is empty; name layers, or leave it out for all linear ones")
    every = [name for name, _ in model.named_modules()]
    for name in names:
        chosen = [module for module in every if module == name or module.endswith(f".{name}")]
        if not chosen:
            known = {module.rpartition(".")[2] for module in linear}
            raise InputError(f"model.lora.target_modules: the model has no layer {name!r}{nearest(name, known)}")
        shared = [m for m in chosen if _is_tied(model, model.get_submodule(m))]
        if shared:
            raise InputError(
                f"model.lora.target_modules: {name!r} has the same weights as the other embedding of this model, and "
                "an adapter would be of one of them only; leave it out"
            )
    return names


def _is_tied(model: Any, layer: nn.Module) -> bool:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return layer in ends and all(end is not None for end in ends) and ends[0].weight is ends[1].weight


def _layers(model: nn.Module) -> list[Any]:
    """The layers that hold adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def _on_cpu(x: Tensor) -> Tensor:
    moved = x.detach().to("cpu", copy=True)
    return nn.Parameter(moved, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else moved

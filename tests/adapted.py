"""Models with adapters for the tests, and what they are to compute, by hand."""

import copy

import torch

from lit_rlhf.models.adapters import LoRA, adapter_parameters, add_lora
from tests.helpers import tiny_model


def adapted(kind="llama", seed=0, trained=True, dtype=torch.float64, **lora):
    """A tiny model with LoRA adapters, which have learnt something unless `trained` is false."""
    model = tiny_model(kind, seed=seed).to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_lora(model, LoRA(**{"r": 3, "alpha": 5, **lora}))
    if trained:
        learn(model)
    return model


def learn(model, seed=1, scale=0.2):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


def by_hand(model, plain, scale):
    """`plain` with W + scale B A for weights, read off the adapted model by the names of its tensors."""
    state = model.state_dict()
    merged = copy.deepcopy(plain).state_dict()
    ends = [name.removesuffix(".lora_A.default.weight") for name in state if name.endswith(".lora_A.default.weight")]
    assert ends
    for name in ends:
        A, B = (state[f"{name}.lora_{x}.default.weight"] for x in "AB")
        delta = scale * (B.double() @ A.double())
        weight = merged[f"{name}.weight"]
        turned = delta.T if delta.shape != weight.shape or "gpt2" in type(plain).__name__.lower() else delta
        merged[f"{name}.weight"] = (weight.double() + turned).to(weight.dtype)
    other = copy.deepcopy(plain)
    other.load_state_dict(merged)
    return other

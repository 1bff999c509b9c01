"""Model folders, tokenizers and adapters that cannot be trained."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from lit_rlhf.models.loading import ASSETS
from tests.malformed.answers import Payload, evaluated, trained

pytestmark = pytest.mark.slow

LAYER = "model.layers.0.mlp.up_proj.weight"


def cut(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


def config(folder, name="config.json", **changes):
    file = Path(folder, name)
    kept = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))


def weights(folder, change):
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def shorten(found):
    found[LAYER] = found[LAYER][:5].contiguous()


def spoil(found):
    found[LAYER][0, 0] = float("nan")


def only(folder, name, write):
    (folder / "model.safetensors").unlink()
    write(folder / name)


def encoder(folder):
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=24, **sizes)).save_pretrained(folder)


def remote(folder):
    config(folder, auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}, model_type="mine")
    (folder / "mine.py").write_text("open('ran', 'w')")


def more_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder)


MODELS = [  # what was done to a copy of the model that ships with the package
    (lambda f: (f / "config.json").unlink(), "model.path: cannot load './model' (ValueError: Unrecognized model"),
    (lambda f: (f / "config.json").write_text("{"), "model.path: cannot load './model' (OSError: It looks like the co"),
    (lambda f: (f / "config.json").write_text("[]"), "model.path: cannot load './model' ("),
    (lambda f: config(f, model_type="nonesuch"), "model.path: cannot load './model' (ValueError: The checkpoint"),
    (lambda f: config(f, hidden_size="many"), "model.path: cannot load './model' (StrictDataclassFieldValidationErro"),
    (lambda f: config(f, num_attention_heads=0), "model.path: cannot load './model' (ZeroDivisionError: "),
    (lambda f: config(f, vocab_size=10), "model.path: cannot load './model' (RuntimeError: "),
    (lambda f: config(f, num_hidden_layers=9), "model.path: ./model has no weights for model.layers.4.input_layernorm"),
    (lambda f: cut(f / "model.safetensors", 100_000), "model.path: cannot load './model' (SafetensorError: "),
    (lambda f: cut(f / "model.safetensors", 8), "model.path: cannot load './model' (SafetensorError: "),
    (lambda f: cut(f / "model.safetensors", 0), "model.path: cannot load './model' (SafetensorError: "),
    (lambda f: (f / "model.safetensors").write_bytes(os.urandom(999)), "model.path: cannot load './model' (Safetenso"),
    (lambda f: (f / "model.safetensors").unlink(), "model.path: cannot load './model' (OSError: Error no file named"),
    (lambda f: weights(f, lambda found: found.pop(LAYER)), f"model.path: ./model has no weights for {LAYER} (1 such"),
    (lambda f: weights(f, shorten), "model.path: cannot load './model' (RuntimeError: "),
    (lambda f: weights(f, spoil), f"model.path: ./model has weights that are no finite numbers, such as {LAYER}"),
    (encoder, "model.path: ./model is an encoder (BertLMHeadModel); give a causal language model"),
    (remote, "model.path: cannot load './model' (ValueError: The repository model contains custom code"),
    (
        lambda f: only(f, "pytorch_model.bin", lambda file: torch.save({"x": Payload()}, file)),
        "model.path: the weights in ./model are a pickle of more than tensors, which could run code and is not read",
    ),
    (
        lambda f: only(f, "pytorch_model.bin", lambda file: file.write_bytes(pickle.dumps(Payload()))),
        "model.path: the weights in ./model are a pickle of more than tensors, which could run code and is not read",
    ),
    (lambda f: (f / "tokenizer.json").write_text("garbage"), "tokenizer: cannot load 'model' (JSONDecodeError: "),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer: cannot load 'model' (KeyError: "),
    (lambda f: cut(f / "tokenizer.json", 300), "tokenizer: cannot load 'model' (JSONDecodeError: "),
    (lambda f: (f / "tokenizer.json").write_bytes(bytes(range(256))), "tokenizer: cannot load 'model' (UnicodeDecode"),
    (lambda f: config(f, "tokenizer_config.json", eos_token=...), "the tokenizer of model has no end-of-sequence to"),
    (
        lambda f: config(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}, tokenizer_class="T"),
        "tokenizer: cannot load 'model' (ValueError: The repository model contains custom code",
    ),
    (more_tokens, "tokenizer: it has "),
]
ARGUMENTS = [
    ("model.path=./nowhere", "model.path: there is no folder ./nowhere; give a model folder"),
    ("model.path=org/nothing", "model.path: cannot load 'org/nothing' (OSError: "),
    ("model.dtype=float99", "model.dtype: 'float99' is no floating-point dtype of torch"),
    ("model.attn_implementation=foo", "model.path: cannot load 'tiny' (ValueError: Specified `attn_implementation="),
    ("model.lora={r: 0}", "model.lora.r must be at least 1, got 0"),
    ("model.lora.target_modules=[nope]", "model.lora.target_modules: the model has no layer 'nope'; known: "),
    ("model.lora.target_modules=[3]", "'model.lora.target_modules' must be str or Sequence[str], got [3]"),
    ("tokenizer=./nowhere", "tokenizer: there is no folder ./nowhere; give a model folder"),
    ("reward.funcs=[./nowhere]", "reward model: there is no folder ./nowhere; give a model folder or a Hub name"),
    ("reward.funcs=[./model]", "reward model: ./model has num_labels=2, and a reward is one number"),
]


@pytest.fixture
def model(here):
    shutil.copytree(ASSETS / "tiny_base", here / "model")
    return here / "model"


@pytest.mark.parametrize(("change", "sentence"), MODELS)
def test_folders(model, change, sentence):
    change(model)
    assert trained("model.path=./model").startswith(sentence)


@pytest.mark.parametrize(("argument", "sentence"), ARGUMENTS)
def test_arguments(model, argument, sentence):
    assert trained(argument).startswith(sentence)


ADAPTERS = [
    (lambda f: (f / "adapter_config.json").write_text("{"), "model.path: cannot load './adapter' ("),
    (lambda f: cut(f / "adapter_model.safetensors", 100), "model.path: cannot load './adapter' (SafetensorError: "),
    (lambda f: config(f, "adapter_config.json", r=3), "model.path: cannot load './adapter' (RuntimeError: "),
    (
        lambda f: config(f, "adapter_config.json", target_modules=["q_proj"]),
        "model.path: ./adapter is an adapter of another model, with ",
    ),
    (
        lambda f: config(f, "adapter_config.json", target_modules=["q_proj", "v_proj", "o_proj"]),
        "model.path: ./adapter has no weights for ",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), ADAPTERS)
def test_adapters(model, here, change, sentence):
    from lit_rlhf.models.adapters import save_adapter
    from lit_rlhf.models.loading import load_causal_lm

    adapted = load_causal_lm(model, lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    save_adapter(adapted, here / "adapter")
    change(here / "adapter")
    assert trained("model.path=./adapter").startswith(sentence)


def test_what_is_evaluated(model):
    weights(model, spoil)
    assert evaluated("model.path=./model").startswith("model.path: ./model has weights that are no finite numbers")

"""Loading models and tokenizers, and the sentence each that cannot be used gets."""

import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import Gemma3Config

from lit_rlhf.data.tasks import character_tokenizer
from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import (
    ASSETS,
    checkpoint_activations,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    max_positions,
)
from lit_rlhf.models.scoring import score
from lit_rlhf.models.wrapper import tokenizer_for
from tests.helpers import random_experience, tiny_model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_longest_sequence_is_read_off_the_configuration(kind):
    assert max_positions(tiny_model(kind)) == 128
    assert max_positions(nn.Linear(1, 1)) is None


def test_the_longest_sequence_of_a_model_that_also_sees_is_that_of_its_text():
    model = nn.Module()
    model.config = Gemma3Config(text_config={"max_position_embeddings": 77})
    assert max_positions(model) == 77


def tokenizer_without(name):
    """The shipped tokenizer, padding on the right, its token of that name taken away."""
    tokenizer = character_tokenizer()
    setattr(tokenizer, name, None)
    tokenizer.padding_side = "right"
    return tokenizer


def test_a_tokenizer_given_as_an_object_is_prepared_and_left_as_it_was():
    given = tokenizer_without("pad_token")
    found = tokenizer_for("tiny", given)
    assert (found.pad_token_id, found.padding_side) == (found.eos_token_id, "left")
    assert (given.pad_token_id, given.padding_side) == (None, "right")
    assert tokenizer_for("tiny", found) is found


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(InputError, match="has no end-of-sequence token; set tokenizer"):
        tokenizer_for("tiny", tokenizer_without("eos_token"))


@pytest.mark.parametrize(
    ("load", "file", "key"),
    [
        (load_causal_lm, "model.safetensors", "model.path"),
        (load_causal_lm, "config.json", "model.path"),
        (load_tokenizer, "tokenizer.json", "tokenizer"),
    ],
)
@pytest.mark.parametrize("kept", [0, 4, 300, -10])
def test_broken_files_get_one_sentence(tmp_path, load, file, key, kept):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny_base", folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:kept])
    with pytest.raises(InputError, match=f"^{key}: cannot load '{folder}' ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny_base", folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 128', '"hidden_size": 64'))
    with pytest.raises(InputError, match=r"^model.path: cannot load .* \(RuntimeError"):
        load_causal_lm(folder)


@pytest.mark.parametrize("dtype", ["int8", "complex64", "float31", "Tensor"])
def test_the_dtype_is_a_floating_one(dtype):
    with pytest.raises(InputError, match=f"^model.dtype: '{dtype}' is no floating-point dtype"):
        load_causal_lm(dtype=dtype)


def test_a_model_that_was_not_loaded_needs_a_tokenizer():
    with pytest.raises(InputError, match=r"^tokenizer: .* give tokenizer=\.\.\."):
        tokenizer_for(tiny_model())


@pytest.mark.parametrize("size", [24, 64, 128])
def test_padded_embeddings_go_with_their_tokenizer(size):
    assert tokenizer_for(tiny_model(vocab_size=size), "tiny").eos_token_id == 1


@pytest.mark.parametrize("size", [1, 512])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, size):
    model = tiny_model(vocab_size=size)
    model.save_pretrained(tmp_path)
    for policy in (model, tmp_path):
        with pytest.raises(InputError, match=f"^tokenizer: it has 21 tokens, .* the model's vocabulary has {size}:"):
            tokenizer_for(policy, "tiny")


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer, load_reward_model])
def test_a_hub_name_without_a_network_is_asked_for_once(load, monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            raise OSError("Name or service not known")

        def __getattr__(self, name):
            pytest.fail("the Hub is away, and was asked again")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"cannot load 'nobody/nothing'.*give a complete model folder"):
        load("nobody/nothing")
    assert asked == [constants.ENDPOINT]
    assert not constants.HF_HUB_OFFLINE, "only for this model"


def test_a_folder_is_no_matter_of_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("the Hub was asked"))
    load_tokenizer(ASSETS / "tiny_base")


def test_activations_can_be_computed_again_instead_of_kept():
    rows, found = random_experience(dtype=torch.float32), []
    rows = replace(rows, prompt_ids=rows.prompt_ids % 16, response_ids=rows.response_ids % 16)
    for again in (False, True):
        model, kept = load_causal_lm(gradient_checkpointing=again), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = score(model.train(), rows).logprobs.sum()
        loss.backward()
        found.append((sum(kept), loss.item(), model.get_input_embeddings().weight.grad))
    (all_kept, loss, gradient), (few_kept, loss2, gradient2) = found
    assert few_kept < all_kept / 2
    assert loss2 == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(gradient2, gradient, rtol=1e-4, atol=1e-4)


def test_a_model_without_checkpointing_of_activations():
    model = tiny_model()
    type(model).supports_gradient_checkpointing, kept = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(InputError, match=r"model.gradient_checkpointing: LlamaForCausalLM has none"):
            checkpoint_activations(model)
    finally:
        type(model).supports_gradient_checkpointing = kept

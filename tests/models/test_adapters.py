"""LoRA: what the adapters compute, that only they train, and that without them the model is the base, to the bit."""

import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import (
    LoRA,
    adapter_parameters,
    add_lora,
    base_size,
    base_weights,
    lora_settings,
    merged,
    save_adapter,
    without_adapters,
)
from lit_rlhf.models.loading import ASSETS, load_causal_lm, vocabulary_size
from lit_rlhf.models.scoring import score
from lit_rlhf.models.wrapper import PolicyReferenceValue
from tests.adapted import adapted, by_hand, learn
from tests.helpers import KINDS, plain_logprobs, random_experience, tiny_model

ROWS = random_experience()


def logprobs(model, rows=ROWS):
    with torch.no_grad():
        return score(model, rows).logprobs


# what the adapters are


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapted_model_computes_with_the_weights_of_the_paper(kind):
    model, plain = adapted(kind), tiny_model(kind).double()
    expected = plain_logprobs(by_hand(model, plain, scale=5 / 3), ROWS)
    torch.testing.assert_close(logprobs(model), expected, atol=1e-10, rtol=0)
    assert (logprobs(plain) - expected).abs().max() > 0.1, "adapters that do nothing prove nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_nothing_and_only_they_train(kind):
    plain, model = tiny_model(kind).double(), adapted(kind, trained=False)
    assert torch.equal(logprobs(model), logprobs(plain))
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training
    assert all("lora_" in name for name in training)
    shapes = {"llama": [(32, 32), (32, 32), (32, 16), (32, 16), (32, 64), (32, 64), (64, 32)]}
    shapes |= {"qwen2": shapes["llama"], "gpt2": [(32, 96), (32, 32), (32, 128), (128, 32)]}
    assert sum(p.numel() for p in adapter_parameters(model)) == 2 * sum(3 * (i + o) for i, o in shapes[kind])
    assert base_size(model) == base_size(plain) == plain.num_parameters()


def test_alpha_is_twice_the_rank_unless_given():
    expected = plain_logprobs(by_hand(model := adapted(alpha=None), tiny_model().double(), scale=2.0), ROWS)
    torch.testing.assert_close(logprobs(model), expected, atol=1e-10, rtol=0)
    assert (lora_settings(model), lora_settings(tiny_model())) == ("{r: 3, alpha: 6}", "null")


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "v_proj"])
def test_layers_are_chosen_by_name(targets):
    model = adapted(target_modules=targets)
    names = {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == ({targets} if isinstance(targets, str) else set(targets))


def test_adapters_of_a_bfloat16_model_train_in_float32():
    model = adapted(dtype=torch.bfloat16, trained=False)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert logprobs(model, random_experience(dtype=torch.float32)).isfinite().all()


# merged


@pytest.mark.parametrize("kind", KINDS)
def test_merging_moves_no_log_prob_by_1e_5_and_gives_the_original_architecture(kind):
    model, plain, rows = adapted(kind, dtype=torch.float32), tiny_model(kind), random_experience(dtype=torch.float32)
    before, weights = logprobs(model, rows), {name: x.clone() for name, x in model.state_dict().items()}
    whole = merged(model)
    assert (logprobs(whole, rows) - before).abs().max() < 1e-5
    assert type(whole) is type(plain)
    assert {n: x.shape for n, x in whole.state_dict().items()} == {n: x.shape for n, x in plain.state_dict().items()}
    for name, weight in by_hand(model, plain, scale=5 / 3).state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], weight, atol=1e-6, rtol=0, msg=name)
    assert torch.equal(logprobs(model, rows), before), "the module goes on as it was"
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert not {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_tied_embeddings_stay_tied_when_merged():
    model = load_causal_lm("tiny", lora={"r": 2})
    whole = merged(learn(model))
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    assert whole.config.tie_word_embeddings


def test_modules_that_train_as_a_whole_are_merged_as_they_were_trained():
    model = tiny_model().double()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    policy = PolicyReferenceValue(get_peft_model(model, config), reference=True).policy
    learn(policy)
    expected = logprobs(policy)
    torch.testing.assert_close(logprobs(merged(policy)), expected, atol=1e-10, rtol=0)
    with without_adapters(policy):
        torch.testing.assert_close(logprobs(policy), logprobs(tiny_model().double()), atol=1e-12, rtol=0)
    assert merged(policy).state_dict().keys() == tiny_model().state_dict().keys()


# off


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_adapters_the_model_is_the_base_to_the_bit_and_afterwards_itself(kind):
    model = adapted(kind).train()
    on, frozen = logprobs(model), adapter_parameters(model)[0].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with without_adapters(model):
        assert torch.equal(logprobs(model), logprobs(tiny_model(kind).double()))
        assert not model.training
    assert torch.equal(logprobs(model), on)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not frozen.requires_grad
    assert all(module.training for module in model.modules())


def test_an_error_inside_leaves_the_adapters_on():
    model = adapted()
    on = logprobs(model)
    with pytest.raises(KeyError), without_adapters(model):
        raise KeyError
    assert torch.equal(logprobs(model), on)
    assert all(p.requires_grad for p in adapter_parameters(model))


def test_the_state_without_adapters_has_the_names_and_numbers_of_the_base():
    found, expected = base_weights(adapted()), tiny_model().double().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


# the reference of a run


def test_the_reference_takes_no_memory_and_is_the_base():
    model = adapted(trained=False)
    tensors = {x.data_ptr() for x in model.state_dict().values()}
    models = PolicyReferenceValue(model, reference=True)
    learn(model)
    assert models.has_reference
    assert models.reference is None
    assert {x.data_ptr() for x in models.state_dict().values()} == tensors, "not a tensor but the policy's"
    assert sum(p.numel() for p in models.parameters()) == sum(p.numel() for p in model.parameters())
    found = models.score_reference(ROWS).logprobs
    torch.testing.assert_close(found, plain_logprobs(tiny_model().double(), ROWS), atol=1e-10, rtol=0)
    assert not found.requires_grad
    torch.testing.assert_close(models.score(ROWS).logprobs.detach(), logprobs(model), atol=0, rtol=0)


def test_the_exact_kl_to_it_and_its_gradient_are_those_to_a_model_of_its_own():
    model = learn(adapted(trained=False))
    models, base = PolicyReferenceValue(adapted(trained=False), reference=True), tiny_model().double()
    models.policy.load_state_dict(model.state_dict())
    expected, found = score(model, ROWS, reference=base).kl, models.score(ROWS, exact_kl=True).kl
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert found.max() > 0.1
    parameters = [adapter_parameters(m) for m in (models.policy, model)]
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), parameters[0]), torch.autograd.grad(expected.sum(), parameters[1]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_a_critic_of_its_own_shares_what_is_frozen_and_has_adapters_of_its_own():
    model = adapted(trained=False)
    models = PolicyReferenceValue(model, value="separate")
    policy, trunk = ({p.data_ptr() for p in m.parameters()} for m in (model, models.value_trunk))
    shared = {p.data_ptr() for p in model.base_model.parameters() if not p.requires_grad}
    assert policy & trunk == shared
    count = sum(p.numel() for p in adapter_parameters(model))
    assert sum(p.numel() for p in models.value_parameters) == count + 32
    before = logprobs(model)
    with torch.no_grad():
        for p in models.value_parameters:
            p.add_(0.1)
    assert torch.equal(logprobs(model), before)
    values = models.score_values(ROWS).values
    with without_adapters(model):
        assert torch.equal(models.score_values(ROWS).values, values), "the critic is no part of the reference"


# a user's own


def test_a_peft_model_is_unwrapped_and_trained_as_it_is():
    given = get_peft_model(tiny_model().double(), LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="adapters have been trained already, and the reference is the model without"):
        models = PolicyReferenceValue(learn(given), reference=True)
    assert type(models.policy) is type(tiny_model())
    assert torch.equal(logprobs(models.policy), logprobs(adapted()))
    assert torch.equal(models.score_reference(ROWS).logprobs, logprobs(tiny_model().double()))
    assert merged(models.policy).state_dict().keys() == tiny_model().state_dict().keys()


def test_adapters_that_cannot_be_trained_are_refused(tmp_path):
    prompts = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match=r"^policy: adapters of the kind PROMPT_TUNING are no layers of the model"):
        PolicyReferenceValue(prompts)
    save_adapter(adapted(dtype=torch.float32), tmp_path)
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path)
    with pytest.raises(InputError, match=r"^policy: its adapter was loaded frozen; load it with is_trainable=True$"):
        PolicyReferenceValue(frozen)
    PolicyReferenceValue(PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True))


def test_two_active_adapters_are_refused():
    model = adapted()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "second")
    model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match=r"^policy: one of its adapters has to be active, got default, second;"):
        PolicyReferenceValue(model)


def test_weights_that_train_beside_the_adapters_are_no_reference():
    model = adapted(trained=False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"^policy: 1 weights outside of its adapters train, such as lm_head.weight"):
        PolicyReferenceValue(model, reference=True)
    PolicyReferenceValue(model)


# from a path


def test_a_model_is_loaded_with_adapters_and_an_adapter_with_its_model(tmp_path):
    model = load_causal_lm("tiny", lora={"r": 4, "target_modules": ["q_proj"]})
    assert lora_settings(learn(model)) == "{r: 4, alpha: 8}"
    save_adapter(model, tmp_path)
    again = load_causal_lm(tmp_path)
    assert vocabulary_size(tmp_path) == vocabulary_size("tiny") == 24
    assert lora_settings(again) == lora_settings(model)
    ids = torch.arange(2, 12).unsqueeze(0)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    with pytest.raises(InputError, match=r"is an adapter already; leave model\.lora out"):
        load_causal_lm(tmp_path, lora={"r": 4})


def test_an_adapters_folder_is_what_peft_loads_beside_its_base(tmp_path):
    model = learn(load_causal_lm(ASSETS / "tiny_base", lora={"r": 4}))
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(load_causal_lm("tiny"), tmp_path)
    ids = torch.arange(2, 12).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.peft_config["default"].base_model_name_or_path == str(ASSETS / "tiny_base")
    assert loaded.peft_config["default"].task_type == "CAUSAL_LM"


# what cannot be


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"r": 0}, "model.lora.r must be at least 1, got 0"),
        ({"alpha": 0}, "model.lora.alpha must be above 0, got 0"),
        ({"dropout": 0.1}, "unknown key 'model.lora.dropout'; known: alpha, r, target_modules"),
        ({"rank": 4}, "unknown key 'model.lora.rank'"),
        (16, "model.lora=16 is no set of settings; write model.lora.r=16"),
        (
            {"target_modules": ["q_prj"]},
            "model.lora.target_modules: the model has no layer 'q_prj'; did you mean",
        ),
        ({"target_modules": ["q_proj", "x"]}, "the model has no layer 'x'; known: down_proj, gate_proj, k_proj"),
        ({"target_modules": []}, "model.lora.target_modules is empty"),
        ({"target_modules": ["lm_head"]}, "'lm_head' has the same weights as the other embedding of this model"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' has the same weights as the other embedding"),
    ],
)
def test_settings_that_no_model_can_have_are_refused(lora, sentence):
    with pytest.raises(InputError) as caught:
        load_causal_lm("tiny", lora=lora)
    assert sentence in str(caught.value)


def test_an_output_embedding_of_its_own_may_have_an_adapter():
    model = adapted(target_modules=["lm_head"])
    torch.testing.assert_close(logprobs(merged(model)), logprobs(model), atol=1e-10, rtol=0)


def test_a_model_without_linear_layers_is_refused():
    model = tiny_model()
    model.model.layers = nn.ModuleList()
    with pytest.raises(InputError, match=r"^model.lora: LlamaForCausalLM has no linear layers to put adapters beside$"):
        add_lora(model, LoRA())


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"^model.lora needs the package peft: pip install 'lit_rlhf\[peft\]'$"):
        load_causal_lm("tiny", lora={"r": 4})


def test_without_adapters_peft_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    models = PolicyReferenceValue(tiny_model().double(), reference=True, value="separate")
    assert torch.equal(models.score_reference(ROWS).logprobs, models.score(ROWS, exact_kl=True).logprobs)

"""The exported folder is the trained model, for anyone who has never heard of this library."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.callbacks.hf_export import HFExport, export
from lit_rlhf.data.modules import ArithmeticData
from lit_rlhf.data.tasks import character_tokenizer
from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import LoRA, add_lora
from lit_rlhf.models.loading import ASSETS, load_causal_lm
from lit_rlhf.types import SamplingConfig
from tests.adapted import learn
from tests.helpers import EOS, KINDS, PAD, build, tiny_model, trainer

SHORT = SamplingConfig(max_new_tokens=8)


def exported(folder, algorithm=GRPO, **arguments):
    sizes = {"prompts_per_rollout": 4, "group_size": 2} if algorithm is GRPO else {"batch_size": 4}
    module = algorithm(policy="tiny", sampling=SHORT, lr=1e-2, **sizes, **arguments)
    fitter = trainer(max_steps=1, callbacks=[HFExport(folder / "deep" / "model")])
    fitter.fit(module, datamodule=ArithmeticData(held_out=16))
    return module, folder / "deep" / "model"


def test_the_folder_holds_the_trained_weights_and_greedily_says_the_same(tmp_path):
    module, folder = exported(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trained, start = module.models.policy.state_dict(), AutoModelForCausalLM.from_pretrained
    untrained = start(GRPO(policy="tiny").models.policy.name_or_path).state_dict()
    assert model.state_dict().keys() == trained.keys()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in trained.items())
    assert not torch.equal(model.state_dict()["lm_head.weight"], untrained["lm_head.weight"])

    texts = ["2+3=", "12+34=", "99+99="]
    prompts = [module.encode_prompt(text) for text in texts]
    assert [tokenizer(text)["input_ids"] for text in texts] == prompts
    greedy = SamplingConfig(max_new_tokens=8, temperature=0.0)
    module.engine.update_weights(module.models.policy, 0)
    rollout = module.engine.generate(prompts, greedy, seed=0)
    for row, prompt in enumerate(prompts):
        ours = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :].tolist()
        assert theirs == ours


def test_the_reference_is_not_exported(tmp_path):
    module, folder = exported(tmp_path, kl_coef=0.1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert module.models.reference is not None
    assert torch.equal(model.lm_head.weight, module.models.policy.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, module.models.reference.lm_head.weight)
    assert model.num_parameters() == module.models.policy.num_parameters()


def test_the_export_of_one_run_is_the_policy_of_the_next(tmp_path):
    trained, folder = exported(tmp_path, SFT)
    reloaded = GRPO(policy=folder)
    assert torch.equal(reloaded.models.policy.lm_head.weight, trained.models.policy.lm_head.weight)
    assert reloaded.tokenizer.eos_token_id == trained.tokenizer.eos_token_id
    assert reloaded.encode_prompt("1+2=") == trained.encode_prompt("1+2=")


def test_only_the_first_rank_writes(tmp_path):
    class Rank:
        is_global_zero = False

    HFExport(tmp_path / "model").on_fit_end(Rank(), build(SFT))
    assert not (tmp_path / "model").exists()


# any model, adapters or none: what `generate` says is what the sampler said


def module_with(kind="llama", dtype=torch.float32, lora=False, tokenizer=None, ends=(EOS,), **arguments):
    """An algorithm on a toy that knows all of the shipped tokenizer's ids."""
    model = tiny_model(kind, vocab_size=24).to(dtype)
    model.generation_config.eos_token_id = list(ends)
    if lora:
        add_lora(model, LoRA(r=3))
        learn(model)
    tokenizer = character_tokenizer() if tokenizer is None else tokenizer
    return GRPO(policy=model, tokenizer=tokenizer, sampling=SHORT, reward_funcs=[len], **arguments)


def said_by_the_sampler(module, ids, new=24):
    module.engine.update_weights(module.models.policy, 0)
    rollout = module.engine.generate(ids, SamplingConfig(max_new_tokens=new, temperature=0.0), seed=0)
    return [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


def said_by_generate(folder, ids, new=24):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [model.generate(torch.tensor([row]), max_new_tokens=new)[0, len(row) :].tolist() for row in ids]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_generate_says_what_the_sampler_says(kind, lora, tmp_path):
    module = module_with(kind, lora=lora, ends=[EOS, 5, 9, 13, 17, 21])
    ids = [[2 + (3 * i + j) % 20 for j in range(1 + i % 5)] for i in range(12)]
    expected = said_by_the_sampler(module, ids)
    export(module, tmp_path / "model")
    assert said_by_generate(tmp_path / "model", ids) == expected
    assert {len(row) for row in expected} > {24}, "some end, some are cut off"
    assert said_by_the_sampler(module, ids) == expected, "the module stays as it is"


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "lora"])
def test_a_model_in_bfloat16_is_exported_in_bfloat16(lora, tmp_path):
    module = GRPO(policy=load_causal_lm("tiny", dtype="bfloat16", lora=lora), sampling=SHORT)
    learn(module.models.policy, scale=0.03)
    ids = [module.encode_prompt(f"{i}+{7 * i % 100}=") for i in range(20)]
    export(module, tmp_path / "model")
    weights, trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), module.export_model().state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in weights.state_dict().items())
    assert {x.dtype for x in weights.state_dict().values()} == {torch.bfloat16}
    assert said_by_generate(tmp_path / "model", ids) == said_by_the_sampler(module, ids)


def test_adapters_of_a_bfloat16_model_are_merged_to_within_its_rounding(tmp_path):
    module = module_with("llama", torch.bfloat16, lora=True)
    export(module, tmp_path / "model")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), torch.arange(2, 20).unsqueeze(0)
    with torch.no_grad():
        found, expected = model(ids).logits.float(), module.models.policy(ids).logits.float()
        base = tiny_model("llama", vocab_size=24).to(torch.bfloat16)(ids).logits.float()
    assert model.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * (base - expected).abs().max()


def test_the_settings_of_generation_are_those_of_the_run(tmp_path):
    module = module_with(lora=True)
    base = module.models.policy.generation_config
    base.repetition_penalty, base.no_repeat_ngram_size, base.do_sample, base.temperature = 5.0, 2, True, 0.5
    base.eos_token_id = [EOS, 5]
    module.sampling = SamplingConfig(max_new_tokens=8, stop=("=",))
    export(module, tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config
    (equals,) = module.tokenizer.encode("=", add_special_tokens=False)
    assert found.eos_token_id == sorted({EOS, 5, equals})
    assert found.pad_token_id == PAD
    assert (found.do_sample, found.temperature) == (True, 0.5)
    assert found.repetition_penalty in (None, 1.0)
    assert not found.no_repeat_ngram_size
    assert base.repetition_penalty == 5.0, "the module's own stays as it is"


def test_the_chat_template_goes_with_the_tokenizer(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    export(module_with(tokenizer=tokenizer), tmp_path / "model")
    messages = [{"role": "user", "content": "1+2"}]
    found = AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(messages, tokenize=False)
    assert found == tokenizer.apply_chat_template(messages, tokenize=False) == "1+2="


# adapters


def fitted(algorithm, folder, epochs=1, **arguments):
    callback = HFExport(folder, **arguments)
    sizes = {"prompts_per_rollout": 4, "group_size": 2} if algorithm is GRPO else {"batch_size": 4}
    module = algorithm(policy=load_causal_lm("tiny", lora={"r": 4}), sampling=SHORT, lr=1e-2, **sizes)
    fitter = trainer(max_steps=2, callbacks=[callback])
    fitter.fit(module, datamodule=ArithmeticData(held_out=16))
    return module


def logits(model, ids=None):
    with torch.no_grad():
        return model(torch.arange(2, 20).unsqueeze(0) if ids is None else ids).logits


def test_a_run_with_adapters_leaves_the_merged_model_and_the_adapter(tmp_path):
    module = fitted(GRPO, tmp_path / "model")
    policy, start = module.models.policy, load_causal_lm("tiny")
    assert (logits(policy) - logits(start)).abs().max() > 1e-3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.state_dict().keys() == start.state_dict().keys()
    assert not hasattr(plain, "peft_config")
    torch.testing.assert_close(logits(plain), logits(policy), atol=1e-5, rtol=0)
    for loaded in (
        PeftModel.from_pretrained(start, tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(logits(loaded), logits(policy))
    assert loaded.peft_config["default"].base_model_name_or_path == str(ASSETS / "tiny_base")
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").eos_token_id == module.tokenizer.eos_token_id


@pytest.mark.slow
def test_a_fit_goes_on_after_an_export(tmp_path):
    def run(folder):
        module = GRPO(policy=tiny_adapted(), sampling=SHORT, lr=1e-2, prompts_per_rollout=4, group_size=2, kl_coef=0.1)
        for _ in range(2):
            module.loop.finish_iteration()
            callbacks = [HFExport(folder / "model")] if folder else []
            trainer(max_epochs=1, callbacks=callbacks).fit(module, datamodule=ArithmeticData(held_out=16))
        return module.state_dict()

    def tiny_adapted():
        torch.manual_seed(0)
        return load_causal_lm("tiny", lora={"r": 4})

    found, expected = run(tmp_path), run(None)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_only_the_adapter_is_written_where_merging_is_off(tmp_path):
    fitted(GRPO, tmp_path / "model", merge=False)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter"}
    for algorithm, policy in ((GRPO, "tiny"), (RewardModeling, load_causal_lm("tiny", lora={"r": 4}))):
        module = algorithm(policy=policy, sampling=SHORT)
        with pytest.raises(InputError, match=r"^callbacks\.export\.merge=false leaves an adapter alone, and"):
            HFExport(tmp_path / "model", merge=False).setup(None, module, "fit")


def test_a_reward_model_with_adapters_is_exported_merged_and_gives_the_modules_rewards(tmp_path):
    module = fitted(RewardModeling, tmp_path / "model")
    assert {file.name for file in tmp_path.iterdir()} == {"model"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    pairs = [{"prompt": "1+2=", "chosen": "3", "rejected": "4"}, {"prompt": "12+34=", "chosen": "46", "rejected": "7"}]
    with torch.no_grad():
        expected = module.compare(module.collate(pairs))
        for i, pair in enumerate(pairs):
            for side, reward in (("chosen", expected.chosen), ("rejected", expected.rejected)):
                text = pair["prompt"] + pair[side] + module.tokenizer.eos_token
                ids = torch.tensor([module.tokenizer.encode(text)])
                assert float(model(ids).logits) == pytest.approx(float(reward[i]), abs=1e-5)


# whole, or not there


def test_a_folder_that_could_not_be_written_whole_is_no_model(tmp_path, monkeypatch):
    module = module_with()
    export(module, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_text("of an older, larger one")

    def fails(self, *args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(module.tokenizer), "save_pretrained", fails)
        for name in ("other", "model"):
            with pytest.raises(OSError, match="no space left"):
                export(module, tmp_path / name)
    assert not (tmp_path / "other").exists()
    assert before.items() <= {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}.items()

    export(module, tmp_path / "model")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before, "nothing old is left"
    assert not (tmp_path / ".model.part").exists()
    assert not (tmp_path / ".model.old").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    callback, module = HFExport(tmp_path / "model"), module_with()
    callback.setup(None, module, "fit")
    (tmp_path / "model" / "thesis.tex").write_text("three years of work")
    with pytest.raises(InputError, match=r"^callbacks\.export\.folder: .*model holds something else than a model;"):
        callback.setup(None, module, "fit")
    (tmp_path / "model" / "config.json").write_text("{}")
    callback.setup(None, module, "fit")


def test_folders_that_are_not_written_may_hold_anything(tmp_path):
    plain, adapted = module_with(), GRPO(policy=load_causal_lm("tiny", lora={"r": 4}), sampling=SHORT)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "wiring.pdf").touch()
    HFExport(tmp_path / "model").setup(None, plain, "fit")
    with pytest.raises(InputError, match="adapter holds something else than a model"):
        HFExport(tmp_path / "model").setup(None, adapted, "fit")
    (tmp_path / "adapter").rename(tmp_path / "model")
    HFExport(tmp_path / "model", merge=False).setup(None, adapted, "fit")


def test_a_checkpoint_is_exported_without_training(tmp_path):
    module, _ = exported(tmp_path)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    other = GRPO(policy="tiny", sampling=SHORT)
    other.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    export(other, tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], x) for name, x in module.models.policy.state_dict().items())

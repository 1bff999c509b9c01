"""Reward models: the rewards of the module they were trained by, of Transformers itself, and what is refused."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lit_rlhf import GRPO, RewardModeling
from lit_rlhf.callbacks.hf_export import HFExport
from lit_rlhf.data import ArithmeticData, RowsDataModule
from lit_rlhf.data.tasks import character_tokenizer
from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.rewards import RewardFunctions, RewardModel
from lit_rlhf.types import SamplingConfig
from tests.chat import CHATML, LLAMA, assistant, byte_tokenizer, user
from tests.helpers import tiny_model, trainer

PROMPTS, COMPLETIONS = ["1+2=", "12+34=", "99+99=", "5+5="], ["3", "47", "198", ""]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model after two steps, and the folder it left."""
    folder = tmp_path_factory.mktemp("run") / "judge"
    module = RewardModeling(policy="tiny", lr=1e-2, batch_size=4)
    trainer(max_steps=2, callbacks=[HFExport(folder)]).fit(module, datamodule=ArithmeticData(held_out=8))
    return module, folder


def module_rewards(module, prompts=PROMPTS, completions=COMPLETIONS):
    pairs = [{"prompt": p, "chosen": c, "rejected": "0"} for p, c in zip(prompts, completions, strict=True)]
    with torch.no_grad():
        return module.compare(module.collate(pairs)).chosen.tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_an_exported_folder_gives_the_modules_rewards(trained, batch_size):
    module, folder = trained
    found = RewardModel(folder, batch_size=batch_size)(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(module_rewards(module), abs=1e-5)
    assert max(found) - min(found) > 1e-2, "all rewards are alike, and any order of them would pass"


def test_a_string_is_a_folder_a_hub_name_or_an_import_path(trained, monkeypatch):
    module, folder = trained
    rewards = RewardFunctions([str(folder), "lit_rlhf.rewards.exact_match"], weights=[1, 0])
    assert rewards.names == ["judge", "exact_match"]
    total, parts = rewards(PROMPTS, COMPLETIONS, [[0]] * 4, {"answer": ["3", "46", "198", "10"]})
    assert total.tolist() == pytest.approx(module_rewards(module), abs=1e-5)
    assert parts[:, 1].tolist() == [1, 0, 1, 0]
    monkeypatch.chdir(folder.parent)
    assert RewardFunctions("judge").names == ["judge"]
    with pytest.raises(
        InputError, match=r"^reward model: there is no folder \./judgement; give a model folder or a Hub"
    ):
        RewardFunctions("./judgement")


def test_a_model_may_be_given_itself(trained):
    module, folder = trained
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rewards = RewardFunctions(model)
    assert rewards.names == ["judge"]
    assert rewards.funcs[0](PROMPTS, COMPLETIONS) == pytest.approx(module_rewards(module), abs=1e-5)
    unnamed = RewardModel(module.export_model(), tokenizer=module.tokenizer)
    assert unnamed(PROMPTS, COMPLETIONS) == pytest.approx(module_rewards(module), abs=1e-5)


def plain_rewards(model, tokenizer, prompts=PROMPTS, completions=COMPLETIONS):
    """One sequence at a time, so that nothing is padded."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = [*tokenizer.encode(prompt + completion, add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            found.append(float(model(torch.tensor([ids])).logits))
    return found


@pytest.mark.parametrize("pad", ["eos", None])
def test_the_reward_is_read_at_eos_although_the_tokenizer_pads_with_it(trained, pad):
    _, folder = trained
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token if pad else None
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    expected = plain_rewards(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    assert RewardModel(model, tokenizer)(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_it_stays_in_eval_mode_without_gradients_and_outside_of_checkpoints(trained):
    _, folder = trained
    judge = RewardModel(folder)
    judge.model.train()
    judge(PROMPTS, COMPLETIONS)
    assert not judge.model.training
    assert not any(weight.requires_grad for weight in judge.model.parameters())
    module = GRPO(policy="tiny", reward_funcs=[judge])
    assert set(module.state_dict()) == set(GRPO(policy="tiny", reward_funcs=[len]).state_dict())
    assert RewardModel(folder, dtype="bfloat16").model.dtype == torch.bfloat16


def test_dropout_changes_nothing(trained):
    _, folder = trained
    config = LlamaConfig.from_pretrained(folder, attention_dropout=0.5)
    model = LlamaForSequenceClassification(config).train()
    judge = RewardModel(model, character_tokenizer())
    assert judge(PROMPTS, COMPLETIONS) == judge(PROMPTS, COMPLETIONS)


def test_autocast_of_the_trainer_leaves_it_alone(trained):
    _, folder = trained
    judge = RewardModel(folder)
    expected = judge(PROMPTS, COMPLETIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert judge(PROMPTS, COMPLETIONS) == expected


def test_a_rollout_is_scored_by_it(trained):
    module, folder = trained
    sampling = SamplingConfig(max_new_tokens=4)
    policy = GRPO(policy="tiny", reward_funcs=[str(folder)], group_size=2, prompts_per_rollout=4, sampling=sampling)
    trainer(max_epochs=1).fit(policy, datamodule=ArithmeticData(held_out=8, train_size=8))
    batch = policy.prompts.take(0, 4)
    rollout = policy.sample(batch)
    texts = [
        policy.tokenizer.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    prompts = [text for text in batch.columns["prompt"] for _ in range(2)]
    assert rollout.raw_rewards.tolist() == pytest.approx(module_rewards(module, prompts, texts), abs=1e-5)


def save(tmp_path, **config):
    folder = tmp_path / "model"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=24, pad_token_id=0, **sizes, **config)).save_pretrained(
        folder
    )
    character_tokenizer().save_pretrained(folder)
    return folder


def refusal(*arguments, **keywords):
    with pytest.raises(InputError) as caught:
        RewardModel(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_anything_but_one_label_is_refused(tmp_path):
    folder = save(tmp_path, num_labels=3)
    sentence = "has num_labels=3, and a reward is one number; give a sequence-classification model with num_labels=1"
    assert f"reward model: {folder} {sentence}" in refusal(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert f"reward model: LlamaForSequenceClassification {sentence}" in refusal(model)
    assert "has num_labels=None" in refusal(torch.nn.Linear(2, 2))


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    base = load_causal_lm()
    assert "has num_labels=2" in refusal(base)
    base.config.num_labels = 1
    base.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    assert f"{tmp_path} has no weights for score.weight, and a head that nobody trained" in refusal(tmp_path)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save(tmp_path, num_labels=1))
    model.name_or_path = ""
    assert "has no tokenizer of its own; give RewardModel(model, tokenizer=...)" in refusal(model)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": 0}, "reward model: batch_size must be at least 1, got 0"),
        ({"dtype": "int8"}, "reward model: dtype: 'int8' is no floating-point dtype"),
    ],
)
def test_arguments_without_a_meaning_are_refused(trained, arguments, sentence):
    assert sentence in refusal(trained[1], **arguments)


def test_rows_longer_than_the_context_are_refused(tmp_path):
    judge = RewardFunctions(str(save(tmp_path, num_labels=1, max_position_embeddings=8)))
    judge(["1+2="], ["333"], [[1]], {})
    with pytest.raises(InputError, match=r"^reward model \S+ reads at most 8 tokens, and a prompt with its comp.* 9;"):
        judge(["1+2="], ["3333"], [[1]], {})


# chat messages


@pytest.fixture(scope="module", params=["one end", "two ends", "two ends, one of them the padding"])
def of_chats(request, tmp_path_factory):
    """A reward model of conversations, and the folder it left."""
    folder = tmp_path_factory.mktemp("chat") / "judge"
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>" if request.param == "one end" else "<|endoftext|>")
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    if request.param != "one end":
        ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        model.generation_config.eos_token_id = ends
    if "padding" in request.param:
        tokenizer.pad_token = "<|im_end|>"
    rows = [{"prompt": user(p), "chosen": assistant(c), "rejected": assistant("?")} for p, c in CHATS if c]
    module = RewardModeling(policy=model, tokenizer=tokenizer, lr=1e-2, batch_size=2)
    trainer(max_steps=2, callbacks=[HFExport(folder)]).fit(module, datamodule=RowsDataModule(rows))
    return module, folder


CHATS = [("what is 1+2?", "it is 3"), ("and the sky?", "blue"), ("say nothing", "")]


def test_conversations_are_judged_as_they_were_learnt(of_chats):
    module, folder = of_chats
    prompts, texts = zip(*((user(p), c) for p, c in CHATS), strict=True)
    expected = module_rewards(module, list(prompts), [assistant(text) for text in texts])
    total, _ = RewardFunctions(str(folder))(prompts, texts, [[1]] * 3, {})
    assert total.tolist() == pytest.approx(expected, abs=1e-5)
    rows = RewardModel(folder).encode(list(prompts), [assistant(text) for text in texts])
    text = module.tokenizer.decode(rows[0])
    assert text == "<|im_start|>user\nwhat is 1+2?<|im_end|>\n<|im_start|>assistant\nit is 3<|im_end|>"


def test_chat_messages_without_a_template_are_refused_before_anything_is_sampled(trained):
    rows = [{"prompt": user("1+2="), "answer": "3"}]
    sentence = "^reward model judge: prompts are chat messages, and its tokenizer has no chat template; set"
    with pytest.raises(InputError, match=sentence):
        RewardFunctions(str(trained[1])).check(rows)
    RewardFunctions(str(trained[1])).check([{"prompt": "1+2="}])
    with pytest.raises(InputError, match=sentence):
        RewardFunctions(str(trained[1])).check([{"prompt": "1+2="}, *rows])
    with pytest.raises(InputError, match="has no chat template"):
        RewardModel(trained[1])([user("1+2=")], [assistant("3")])


def test_prompts_that_it_cannot_read_are_refused_before_anything_is_sampled(tmp_path, of_chats):
    judge = RewardFunctions(str(save(tmp_path, num_labels=1, max_position_embeddings=8)))
    judge.check([{"prompt": "1+2="}, {"prompt": "11+22+="}])
    with pytest.raises(InputError, match=r"^reward model \S+ reads at most 8 tokens, .* has 9; lower"):
        judge.check([{"prompt": "1+2="}, {"prompt": "11+22+3="}])
    chat = RewardModel(of_chats[1])
    chat.tokenizer.chat_template = LLAMA
    with pytest.raises(InputError, match="refuses messages of the roles system: Only user and assistant"):
        RewardFunctions(chat).check([{"prompt": user("a")}, {"prompt": [{"role": "system", "content": "b"}]}])
    plain = RewardModel(tmp_path / "model")
    tokenizer, config = character_tokenizer(), plain.model.config
    tokenizer.eos_token, config.eos_token_id = None, None
    with pytest.raises(InputError, match="has no EOS token, so that no completion can end"):
        RewardFunctions(RewardModel(plain.model, tokenizer)).check([{"prompt": "1+2="}])


# encoders


def test_an_encoder_is_read_with_its_own_special_tokens():
    """They have no EOS: the text ends with the separator, and the first token is pooled."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bert_backend(), **BERT)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **sizes)
    model = BertForSequenceClassification(config).eval()
    judge = RewardModel(model, tokenizer)
    expected = []
    for prompt, completion in (("a b", "c"), ("c", "a a b")):
        ids = tokenizer(f"{prompt} {completion}", return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.sep_token_id
        with torch.no_grad():
            expected.append(float(model(ids).logits))
    assert judge(["a b", "c"], ["c", "a a b"]) == pytest.approx(expected, abs=1e-5)


BERT = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def bert_backend():
    words = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return backend

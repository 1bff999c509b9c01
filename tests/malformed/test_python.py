"""The same in Python: an `InputError`, which is a `ValueError` of one sentence."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from lit_rlhf import DPO, GRPO, PPO, SFT, RewardModeling
from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.data import FileData, RowsDataModule
from lit_rlhf.data.token_cache import TokenCache
from lit_rlhf.errors import InputError
from lit_rlhf.models.loading import load_causal_lm, load_reward_model, load_tokenizer
from lit_rlhf.rewards import RewardFunctions
from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.types import SamplingConfig, from_dict
from tests.helpers import EOS, PAD, NumberTokenizer, build, tiny_model, trainer
from tests.malformed.answers import Payload

ROWS = [{"prompt": "5 6", "answer": "7"}] * 4


class OtherIds(NumberTokenizer):
    def __init__(self, **ids):
        self.__dict__.update(ids)


def fit(module, rows, held_out=()):
    trainer().fit(module, datamodule=RowsDataModule(rows, held_out))


def engine(**arguments):
    made = TransformersEngine(eos_token_ids=[EOS], pad_token_id=PAD)
    made.update_weights(tiny_model(), 0)
    return made.generate(**{"prompt_ids": [[5, 6]], "sampling": SamplingConfig(4), "seed": 0, **arguments})


CASES = [
    (lambda: build(GRPO, group_size=1), "algo.group_size=1: GRPO compares the samples of one prompt"),
    (lambda: build(GRPO, lr="fast"), "algo.lr must be a number, got 'fast'"),
    (lambda: build(GRPO, lr=True), "algo.lr must be a number, got True"),
    (lambda: build(GRPO, lr=float("nan")), "algo.lr must be a finite number, got nan"),
    (lambda: build(GRPO, betas=0.9), "algo.betas must be two numbers from 0 to below 1, got 0.9"),
    (lambda: build(GRPO, policy_loss=3), "policy loss: 3 is no function"),
    (lambda: build(GRPO, sampling={"top_p": 2}), "sampling: top_p must be in (0, 1], got 2"),
    (lambda: build(GRPO, sampling={"stop": "abc"}), "sampling: stop must be a list of texts, got 'abc'"),
    (lambda: build(GRPO, reward_funcs=[3]), "a reward function must be a callable or an import string, got 3"),
    (lambda: build(GRPO, reward_funcs=3), "reward functions: give callables or import strings, got 3"),
    (lambda: build(PPO, gamma=2), "algo.gamma=2 and algo.gae_lambda=0.95 must be from 0 to 1"),
    (lambda: build(DPO, beta=-1), "algo.beta must be above 0, got -1"),
    (lambda: GRPO(policy=tiny_model()), "tokenizer: the policy was not loaded from anywhere"),
    (lambda: GRPO(policy="./nowhere", tokenizer="tiny"), "model.path: there is no folder ./nowhere"),
    (lambda: build(GRPO, tokenizer=OtherIds(eos_token_id=None)), "the tokenizer of OtherIds has no end-of-sequence"),
    (lambda: build(GRPO, tokenizer=OtherIds(eos_token_id=64)), "tokenizer: it has 64 tokens, EOS is 64, padding 0"),
    (lambda: build(GRPO, tokenizer=OtherIds(pad_token_id=70)), "tokenizer: it has 64 tokens, EOS is 1, padding 70"),
    (lambda: build(GRPO, model=tiny_model(vocab_size=512), tokenizer="tiny"), "tokenizer: it has "),
    (lambda: fit(build(SFT, batch_size=2), [{"prompt": "5", "completion": "99"}] * 4), "tokenizer: it makes the token"),
    (lambda: fit(build(SFT, batch_size=2), [{"prompt": "99", "completion": "5"}] * 4), "tokenizer: it makes the token"),
    (lambda: fit(build(SFT, batch_size=2), []), "data: there are no rows to train on"),
    (lambda: fit(build(RewardModeling, batch_size=2), ROWS), "RewardModeling needs a text 'chosen' and a text 'reje"),
    (lambda: fit(build(GRPO, prompts_per_rollout=3, group_size=3, minibatches=2), ROWS), "9 samples per device"),
    (lambda: RowsDataModule([{"prompt": ""}]), "training row 1: 'prompt' is empty"),
    (lambda: RowsDataModule([3]), "training row 1: found a number; expected an object with a 'prompt'"),
    (lambda: RowsDataModule(ROWS, validation_batch_size="all"), "data.validation_batch_size must be a number"),
    (lambda: FileData("nowhere.jsonl"), "nowhere.jsonl does not exist"),
    (lambda: RewardFunctions([len], weights=[1, 2]), "reward weights: 1 needed, one for each of len, got 2"),
    (lambda: engine(prompt_ids=[]), "there are no prompts to sample for"),
    (lambda: engine(prompt_ids=[[]]), "prompt 0 is empty"),
    (lambda: engine(prompt_ids=[[99]]), "token id 99 in "),
    (lambda: engine(prompt_ids=[[5] * 200]), "a prompt of 200 tokens"),
    (lambda: engine(seed=[1, 2]), "got 2 seeds for 1 prompts"),
    (lambda: from_dict({}, pad_token_id=0), "batch: "),
    (lambda: from_dict({"input_ids": [1]}, pad_token_id=0), "batch: "),
    (lambda: from_dict({"prompt_ids": torch.ones(2)}, pad_token_id=0), "batch: "),
    (lambda: load_causal_lm(dtype="int8"), "model.dtype: 'int8' is no floating-point dtype of torch"),
    (lambda: load_causal_lm(lora={"rank": 3}), "unknown key 'model.lora.rank'"),
    (lambda: load_tokenizer("./nowhere"), "tokenizer: there is no folder ./nowhere"),
    (lambda: load_reward_model("tiny"), "reward model: tiny has num_labels=2"),
    (lambda: AtomicCheckpointIO().load_checkpoint("nowhere.ckpt"), "ckpt_path: there is no file nowhere.ckpt"),
]


@pytest.mark.parametrize(("call", "sentence"), CASES)
def test_calls(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).startswith(sentence), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cache_of_tokens_with_code_in_it_is_not_run():
    tokenizer = load_tokenizer()
    cache = TokenCache("cache", tokenizer)
    assert cache.get(["1+1="], lambda: [[3, 4]]) == [[3, 4]]
    (file,) = Path("cache").iterdir()
    for write in (lambda: torch.save({"ids": Payload()}, file), lambda: file.write_bytes(pickle.dumps(Payload()))):
        write()
        assert cache.get(["1+1="], lambda: [[5]]) == [[5]], "what cannot be read is as good as not there"
        assert not Path("ran").exists()


def test_a_cache_of_a_reference_with_code_in_it_is_not_run():
    rows = [{"prompt": "5 6", "chosen": "7", "rejected": "8"}] * 4
    for _ in range(2):
        module = build(DPO, batch_size=4, reference_cache="cache")
        if not Path("cache").exists():
            fit(module, rows)
            continue
        (file,) = Path("cache").iterdir()
        torch.save({"logprobs": Payload()}, file)
        with pytest.raises(InputError, match=r"algo.reference_cache: .* cannot be read"):
            fit(module, rows)
    assert not Path("ran").exists()


def test_an_adapter_that_does_not_say_what_it_is_of():
    Path("adapter").mkdir()
    for content in ("{", "{}", "[]"):
        Path("adapter/adapter_config.json").write_text(content)
        with pytest.raises(InputError, match=r"^model.path: "):
            GRPO(policy="adapter", tokenizer="tiny")
    Path("adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./nowhere"}))
    with pytest.raises(InputError, match=r"^model.path: "):
        GRPO(policy="adapter", tokenizer="tiny")

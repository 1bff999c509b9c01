"""Chat messages through whole runs: resumed from the middle with the token ids from disk, and on two ranks."""

import pytest
import torch

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.data.modules import RowsDataModule
from tests.algorithms.ranks import assert_same_run, reported, start_of
from tests.algorithms.resuming import assert_same, checkpointed, everything
from tests.chat import CHATML, LLAMA, assistant, byte_tokenizer, user
from tests.helpers import build, tiny_model, trainer

WORDS = ["the", "sky", "is", "blue", "and", "the", "sea", "green", "says", "user", "to", "assistant"]
ROWS = [
    {
        "prompt": user(" ".join(WORDS[: 1 + i % 5])),
        "completion": assistant(WORDS[i]),
        "chosen": assistant(WORDS[i]),
        "rejected": assistant(f"{WORDS[i]} {WORDS[-i]}"),
    }
    for i in range(8)
]
SIZES = {
    SFT: {"batch_size": 4, "sampling": {"max_new_tokens": 4}},
    DPO: {"batch_size": 4, "sampling": {"max_new_tokens": 4}},
    GRPO: {"prompts_per_rollout": 4, "group_size": 2, "minibatches": 2, "sampling": {"max_new_tokens": 4}},
}


def says_blue(prompts, completions, completion_ids, **kwargs):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts), "messages stay messages"
    return [float(sum(ids) % 3) for ids in completion_ids]


def module_of(algorithm, seed=0, template=CHATML, kind=None, **arguments):
    tokenizer = byte_tokenizer(template, bos=template == LLAMA, eos="</s>" if template == LLAMA else "<|im_end|>")
    model = tiny_model(seed=seed, vocab_size=300, eos_token_id=tokenizer.eos_token_id).double()
    defaults = {"tokenizer": tokenizer, "reward_funcs": [says_blue], "lr": 1e-2, "seed": 7}
    return build(algorithm, model, **{**defaults, **SIZES[kind or algorithm], **arguments})


@pytest.mark.parametrize("algorithm", SIZES)
def test_a_resumed_run_with_a_token_cache_ends_bit_for_bit_like_one_without_a_break(algorithm, tmp_path):
    def fit(epochs, seed=0, ckpt_path=None, callbacks=(), **data):
        module = module_of(algorithm, seed)
        saving = {"callbacks": list(callbacks), "enable_checkpointing": bool(callbacks)}
        fitter = trainer(1, 1, epochs, plugins=[AtomicCheckpointIO()], **saving)
        fitter.fit(module, datamodule=RowsDataModule(ROWS, **data), ckpt_path=ckpt_path)
        return everything(module, fitter)

    whole = fit(3)
    cache = {"token_cache": tmp_path / "tokens"}
    saves = checkpointed(tmp_path, every_n_train_steps=3, save_on_train_epoch_end=False)  # in the middle of a pass
    assert_same(fit(3, callbacks=[saves], **cache), whole)
    checkpoint = next(tmp_path.glob("*step=3*.ckpt"))
    assert_same(fit(3, seed=1, ckpt_path=checkpoint, **cache), whole)
    assert list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize("algorithm", SIZES)
def test_two_ranks_train_as_one_does(algorithm, tmp_path):
    reports = {}
    for devices in (1, 2):
        whole = {"minibatches": 1} if algorithm is GRPO else {}  # each rank shuffles its own rows into minibatches
        module = module_of(reported(algorithm, tmp_path), template=LLAMA, kind=algorithm, **whole)
        start = start_of(module)
        data = RowsDataModule(ROWS, token_cache=tmp_path / "tokens")
        trainer(devices, 1, 1).fit(module, datamodule=data)
        reports[devices] = [torch.load(tmp_path / f"{devices}x1-{rank}.pt") for rank in range(devices)]
    assert_same_run(reports[2], reports[1][0], start)

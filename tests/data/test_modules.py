"""Rows that do not fit the model's context are found before training, by what the algorithm does with them."""

import json

import pytest

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.data.modules import FileData, RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import exact_match, numeric_answer
from lit_rlhf.types import SamplingConfig
from tests.helpers import build, sum_of_ids, tiny_model, trainer

CONTEXT = 128  # positions of the tiny model


def demonstration(prompt, completion):
    """A row of so many tokens; EOS is one more."""
    return {"prompt": "5 " * prompt, "completion": "6 " * completion}


def prepared(algorithm, rows, held_out=(), new_tokens=64, rewards=(sum_of_ids,), kind="llama", **arguments):
    """The data module after its set-up for the algorithm."""
    sampling = SamplingConfig(max_new_tokens=new_tokens)
    module = build(algorithm, tiny_model(kind), sampling=sampling, reward_funcs=list(rewards) or None)
    data = RowsDataModule(rows, held_out, **arguments)
    data.trainer = trainer()
    data.trainer.strategy.connect(module)
    data.setup("fit")
    return data


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_demonstration_may_fill_the_context_and_no_more(kind):
    fits, long = demonstration(100, CONTEXT - 101), demonstration(100, CONTEXT - 100)
    assert prepared(SFT, [fits] * 2, kind=kind).train_rows == [fits] * 2
    sentence = "1 of 2 training rows with completion and EOS do not fit the model: the longest has 129 tokens, .* 128;"
    with pytest.raises(InputError, match=sentence):
        prepared(SFT, [fits, long], kind=kind)
    assert prepared(SFT, [long, fits], kind=kind, long_rows="drop").train_rows == [fits]


def test_a_prompt_to_sample_from_needs_room_for_the_completion():
    fits, long = demonstration(CONTEXT - 64, 1), demonstration(CONTEXT - 63, 1)
    sentence = "the longest has 65 tokens, and the model's context less rollout.max_new_tokens leaves 64; "
    with pytest.raises(InputError, match=f"1 of 2 training prompts do not fit the model: {sentence}"):
        prepared(GRPO, [fits, long])
    with pytest.raises(InputError, match=f"1 of 2 held-out prompts do not fit the model: {sentence}"):
        prepared(SFT, [fits], [fits, long])
    assert prepared(GRPO, [fits, long], [long, fits], long_rows="drop").held_out_rows == [fits]


def test_held_out_prompts_of_which_nothing_is_sampled_may_be_long():
    long = demonstration(CONTEXT, 1)
    assert prepared(SFT, [demonstration(1, 1)], [long], rewards=()).held_out_rows == [long]


@pytest.mark.parametrize(
    ("answers", "verifiers"),
    [
        ([None, "7", 8], [numeric_answer]),
        ([None, "7", "eight"], [exact_match]),
        ([None, None, None], []),
    ],
)
def test_rows_whose_answer_is_null_do_not_choose_the_verifier(tmp_path, answers, verifiers):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "How many?", "answer": answer}) for answer in answers))
    assert FileData(file).reward_funcs == verifiers

"""Rows that do not fit the model's context are found before training, by what the algorithm does with them."""

import json

import pytest
from lightning.pytorch.loggers.logger import DummyLogger

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.data.modules import FileData, RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import exact_match, numeric_answer
from lit_rlhf.types import SamplingConfig
from tests.chat import assistant, user
from tests.helpers import EOS, build, sum_of_ids, tiny_model, trainer

CONTEXT = 128  # positions of the tiny model
CHAT_PAIR = {"prompt": user("1+1?"), "chosen": assistant("2"), "rejected": assistant("3")}


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
    long = {**demonstration(CONTEXT, 1), "completion": None}
    assert prepared(SFT, [demonstration(1, 1)], [long], rewards=()).held_out_rows == [long]


def test_held_out_demonstrations_are_read_and_have_to_fit():
    with pytest.raises(InputError, match="1 of 1 held-out rows with completion and EOS do not fit the model"):
        prepared(SFT, [demonstration(1, 1)], [demonstration(CONTEXT, 1)], rewards=())


@pytest.mark.parametrize(
    ("answers", "verifiers"),
    [
        ([None, "7", 8], [numeric_answer]),
        ([None, "7", "eight"], [exact_match]),
        (["7", "1/2"], [exact_match]),
        (["x = 3 or x = 2"], [exact_match]),
        ([r"\frac{1}{2}"], [exact_match]),
        (["2^{10}"], [exact_match]),
        (["2024-01-05"], [exact_match]),
        (["7 8"], [exact_match]),
        ([" $-1,234.50 ", "3.", "50 %", ".5", "$7$", 2.0, "2 * 36 = 72\n#### 72"], [numeric_answer]),
        (["72\n#### 1/2"], [exact_match]),
        ([None, None, None], []),
    ],
)
def test_rows_whose_answer_is_null_do_not_choose_the_verifier(tmp_path, answers, verifiers):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "How many?", "answer": answer}) for answer in answers))
    assert FileData(file).reward_funcs == verifiers


class Logged(DummyLogger):
    """Keeps what is logged of the rows' lengths."""

    def __init__(self):
        super().__init__()
        self.found = []

    def log_metrics(self, metrics, step=None):
        self.found += [(name, value) for name, value in metrics.items() if name.startswith("data/")]


@pytest.mark.parametrize(("then", "said", "kept"), [("drop", "left out", 4), ("truncate", "cut", 5)])
def test_rows_that_are_dropped_or_cut_are_counted_printed_and_logged_once(then, said, kept, capsys):
    rows = [demonstration(3, 2)] * 4 + [demonstration(100, CONTEXT)]
    module = build(SFT, tiny_model(), sampling=SamplingConfig(max_new_tokens=64), batch_size=4)
    data = RowsDataModule(rows, [demonstration(100, 1), demonstration(1, 1)], long_rows=then)
    fitter = trainer(epochs=2, limit_val_batches=1.0)
    fitter.loggers = [logger := Logged()]
    fitter.validate(module, datamodule=data, verbose=False)
    fitter.fit(module, datamodule=data)
    fitter.validate(module, datamodule=data, verbose=False)
    out = capsys.readouterr().out
    assert out.count(f"{said} 1 of 5 training rows with completion and EOS, longer than 128 tokens") == 1
    assert out.count(f"{said} 1 of 2 held-out prompts, longer than 64 tokens") == 1
    assert sorted(logger.found) == [("data/long_held_out_rows", 1.0), ("data/long_training_rows", 1.0)]
    assert (len(data.train_rows), len(data.held_out_rows)) == (kept, kept - 3)


def test_what_is_cut_fits_and_what_is_not_stays_whole():
    rows = [demonstration(3, 2), demonstration(100, CONTEXT), demonstration(CONTEXT, 1)]
    data = prepared(SFT, rows, long_rows="truncate")
    batch = data.trainer.lightning_module.collate(data.train_rows)
    prompts, responses = batch.prompt_mask.sum(1).tolist(), batch.response_mask.sum(1).tolist()
    assert (prompts, responses) == ([3, 64, 126], [3, 64, 2])
    ends = [ids[mask][-1].item() for ids, mask in zip(batch.response_ids, batch.response_mask, strict=True)]
    assert ends == [EOS, 6, EOS], "a completion that is cut does not end"


def test_prompts_to_sample_from_are_cut_to_what_the_completion_leaves():
    data = prepared(GRPO, [demonstration(CONTEXT, 1), demonstration(3, 1)], long_rows="truncate")
    module = data.trainer.lightning_module
    assert [len(module.encode_prompt(row["prompt"])) for row in data.train_rows] == [64, 3]
    sentence = "training prompts cannot be cut to fit: the model's context less rollout.max_new_tokens leaves 0; "
    with pytest.raises(InputError, match=sentence):
        prepared(GRPO, data.train_rows, new_tokens=CONTEXT, long_rows="truncate")


def test_later_passes_are_not_cut_in_silence():
    class Growing(RowsDataModule):
        def rows_of(self, iteration):
            return [demonstration(3, 2 + 200 * iteration)] * 4

    module = build(SFT, tiny_model(), batch_size=4, reward_funcs=None)
    with pytest.raises(InputError, match="a row of 206 tokens does not fit the model, which has room for 128"):
        trainer(epochs=2).fit(module, datamodule=Growing([demonstration(3, 2)] * 4))


def test_an_unknown_choice_for_long_rows_is_refused():
    with pytest.raises(InputError, match=r"data\.long_rows must be one of stop, drop, truncate, got 'cut'"):
        RowsDataModule([demonstration(1, 1)], long_rows="cut")


def test_empty_completions_are_refused_before_anything_is_trained_on():
    with pytest.raises(InputError, match="SFT: 'completion' is empty in 1 of 2 rows"):
        prepared(SFT, [demonstration(1, 1), demonstration(1, 0)])
    assert prepared(GRPO, [demonstration(1, 1), demonstration(1, 0)]).train_rows, "which does not read them"


def test_chat_messages_need_a_chat_template():
    with pytest.raises(InputError, match="has no chat template, and the data has chat messages"):
        prepared(GRPO, [{"prompt": user("5 6")}])


def test_rewards_see_none_in_columns_that_a_row_lacks():
    seen = []

    def right(completions, answer, tests, **kwargs):
        seen.extend(zip(answer, tests, strict=True))
        return [1.0] * len(completions)

    sizes = {"prompts_per_rollout": 2, "group_size": 2, "sampling": SamplingConfig(max_new_tokens=2)}
    module = build(GRPO, tiny_model(), reward_funcs=[right], minibatches=1, **sizes)
    data = RowsDataModule([{"prompt": "5", "answer": "6"}, {"prompt": "7", "tests": "8"}])
    trainer().fit(module, datamodule=data)
    assert sorted(seen, key=str) == [("6", None), ("6", None), (None, "8"), (None, "8")]


@pytest.mark.parametrize(
    ("row", "arguments", "expected"),
    [
        (
            {"prompt": "1+1?", "completion": "2"},
            {"prompt_template": "Q: $\\nabla$ {prompt}\nA:"},
            {"prompt": "Q: $\\nabla$ 1+1?\nA:", "completion": "2"},
        ),
        (
            {"prompt": "{1}+1?", "completion": "2", "answer": "2"},
            {"prompt_template": "{x}\n{prompt}", "system_prompt": "Be brief."},
            {
                "prompt": [{"role": "system", "content": "Be brief."}, *user("{x}\n{1}+1?")],
                "completion": assistant("2"),
                "answer": "2",
            },
        ),
        ({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, {"system_prompt": ""}, CHAT_PAIR),
        (
            {"prompt": [*user("hi"), *assistant("ho"), *user("1+1?")]},
            {"prompt_template": "{prompt} Answer!"},
            {"prompt": [*user("hi"), *assistant("ho"), *user("1+1? Answer!")]},
        ),
        (
            {"prompt": [{"role": "system", "content": "own"}, *user("1+1?")]},
            {"system_prompt": "ours"},
            {"prompt": [{"role": "system", "content": "own"}, *user("1+1?")]},
        ),
    ],
)
def test_how_prompts_are_presented(row, arguments, expected):
    data = RowsDataModule([row], [row], **arguments)
    assert data.train_rows == data.held_out_rows == [expected]


def test_a_template_without_a_place_for_the_prompt_is_refused():
    with pytest.raises(
        InputError, match=r"data\.prompt_template='Question:' has no \{prompt\}, where the prompt is put"
    ):
        RowsDataModule([{"prompt": "5"}], prompt_template="Question:")

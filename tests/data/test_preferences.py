"""Pairs of text to padded batches, from the built-in task and from files."""

import json

import pytest
import torch

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.data.collate import collate_completions, collate_preferences
from lit_rlhf.data.encoding import Encoder
from lit_rlhf.data.modules import ArithmeticData, FileData
from lit_rlhf.data.tasks import arithmetic_splits, character_tokenizer, demonstrations, preference_pairs
from lit_rlhf.errors import InputError
from lit_rlhf.types import SamplingConfig
from tests.helpers import EOS, PAD, NumberTokenizer, trainer
from tests.pairs import pair_rows

ROWS = [
    {"prompt": "5 6", "chosen": "7", "rejected": "8 9 1"},  # this one ends with EOS already
    {"prompt": "5", "chosen": "10 11 12", "rejected": ""},
]


def test_both_completions_end_with_eos_once_and_have_one_width():
    batch = collate_preferences(Encoder(NumberTokenizer(), [EOS]), ROWS, PAD)
    assert batch.prompt_ids.tolist() == [[5, 6], [PAD, 5]]
    assert batch.prompt_mask.tolist() == [[True, True], [False, True]]
    assert batch.chosen_ids.tolist() == [[7, EOS, PAD, PAD], [10, 11, 12, EOS]]
    assert batch.rejected_ids.tolist() == [[8, 9, EOS, PAD], [EOS, PAD, PAD, PAD]]
    assert batch.chosen_mask.sum(1).tolist() == [2, 4]
    assert batch.rejected_mask.sum(1).tolist() == [3, 1]
    assert batch.margin is None


@pytest.mark.parametrize(
    ("margins", "expected"), [([None, None], None), ([1, 0.5], [1.0, 0.5]), ([2.0, None], [2.0, None])]
)
def test_margins_are_taken_where_rows_have_them(margins, expected):
    rows = [{**row, "margin": margin} for row, margin in zip(ROWS, margins, strict=True)]
    found = collate_preferences(Encoder(NumberTokenizer(), [EOS]), rows, PAD).margin
    if expected is None:
        assert found is None
    else:
        assert [None if x != x else x for x in found.tolist()] == expected
        assert found.dtype == torch.float32


def test_a_list_is_no_margin():
    """One would be broadcast over all pairs."""
    with pytest.raises(InputError, match=r"^a row of pairs: 'margin' is a list; expected a finite number, or none$"):
        collate_preferences(Encoder(NumberTokenizer(), [EOS]), [{**row, "margin": [1.0]} for row in ROWS], PAD)


def test_a_completion_is_encoded_alike_in_a_pair_and_in_a_demonstration():
    tokenizer = character_tokenizer()
    encoder, pad = Encoder(tokenizer, [tokenizer.eos_token_id]), tokenizer.pad_token_id
    rows = [{"prompt": "12+34=", "completion": "46", "chosen": "46", "rejected": "4600"}]
    pair, demonstration = collate_preferences(encoder, rows, pad), collate_completions(encoder, rows, pad)
    assert pair.chosen_ids[pair.chosen_mask].tolist() == demonstration.response_ids[0].tolist()
    assert torch.equal(pair.prompt_ids, demonstration.prompt_ids)


def test_the_built_in_task_has_demonstrations_and_pairs_in_every_row():
    data = ArithmeticData(held_out=20)
    train, test = arithmetic_splits(held_out=20)
    shown = demonstrations(train, 0, 0.5, 3)
    rows = data.rows_of(3)
    columns = ("prompt", "answer", "completion")
    assert [[row[c] for c in columns] for row in rows] == [[row[c] for c in columns] for row in shown], (
        "as SFT had them"
    )
    for row in [*rows, *data.held_out_rows]:
        assert row["chosen"] == row["answer"] != row["rejected"]
    assert data.held_out_rows == preference_pairs(test, 0) == ArithmeticData(held_out=20).held_out_rows


def test_pairs_are_drawn_anew_in_each_pass_unless_they_are_fixed():
    rejected = lambda i, **kw: [row["rejected"] for row in ArithmeticData(held_out=1, **kw).rows_of(i)]  # noqa: E731
    first = rejected(0)
    assert first == rejected(0)
    changed = sum(a != b for a, b in zip(first, rejected(1), strict=True)) / len(first)
    assert 0.7 < changed < 0.95  # one of six wrong answers comes again
    assert rejected(0, fixed_pairs=True) == rejected(5, fixed_pairs=True) == first
    completions = [[row["completion"] for row in ArithmeticData(fixed_pairs=True).rows_of(i)] for i in (0, 1)]
    assert completions[0] != completions[1], "demonstrations are never fixed"


def test_a_file_of_pairs_trains_and_validates(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{**row, "margin": 0.5} for row in pair_rows(10)]
    texts = [{k: v if k == "margin" else v.replace(" ", "+") for k, v in row.items()} for row in rows]
    file.write_text("\n".join(map(json.dumps, texts)))
    module = DPO(policy="tiny", batch_size=4, sampling=SamplingConfig(max_new_tokens=4))
    fitter = trainer(limit_val_batches=1.0)
    fitter.fit(module, datamodule=FileData(file, held_out=2))
    assert module.global_step == 2
    assert {name for name in fitter.callback_metrics if name[:4] == "val/"} == {
        "val/preference_accuracy",
        "val/reward_margin",
    }

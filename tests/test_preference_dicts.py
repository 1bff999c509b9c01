"""Pairs as plain dictionaries: where the prompt ends, what padding may look like, and what is refused."""

import pytest
import torch

from lit_rlhf.errors import InputError
from lit_rlhf.types.preference_dicts import preference_batch_from_dict


def as_dict(chosen, rejected, left=False, **extra):
    """Lists of whole sequences, padded with token 9 on one side."""
    found = {}
    for side, rows in (("chosen", chosen), ("rejected", rejected)):
        width = max(map(len, rows)) + 1
        padding = [[9] * (width - len(row)) for row in rows]
        both = [pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)]
        mask = [[0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for r, p in zip(rows, padding)]  # noqa: B905
        found |= {f"{side}_input_ids": torch.tensor(both), f"{side}_attention_mask": torch.tensor(mask)}
    return found | extra


def unpadded(batch, part):
    ids, mask = getattr(batch, f"{part}_ids"), getattr(batch, f"{part}_mask")
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ([5, 6, 7, 1], [5, 6, 8, 3, 1], [5, 6]),
        ([5, 6, 1], [5, 6, 4, 1], [5, 6]),  # one completion is EOS alone
        ([5, 6], [5, 6, 4, 1], [5]),  # one sequence begins the other: a token is left for its completion
        ([5, 6, 7], [5, 6, 7], [5, 6]),  # both are the same
        ([5, 6], [5, 7], [5]),
    ],
)
def test_the_prompt_is_the_common_beginning(chosen, rejected, prompt, left):
    other = ([3, 4, 5, 6, 7, 8, 1], [3, 4, 5, 2])
    batch = preference_batch_from_dict(as_dict([chosen, other[0]], [rejected, other[1]], left), pad_token_id=0)
    assert unpadded(batch, "prompt") == [prompt, [3, 4, 5]]
    assert unpadded(batch, "chosen") == [chosen[len(prompt) :], [6, 7, 8, 1]]
    assert unpadded(batch, "rejected") == [rejected[len(prompt) :], [2]]
    assert batch.chosen_ids.shape == batch.rejected_ids.shape
    assert batch.prompt_mask[:, -1].all(), "prompts are padded on the left"
    assert batch.chosen_mask[:, 0].all(), "completions on the right"
    assert set(batch.chosen_ids[~batch.chosen_mask].tolist()) <= {0}
    assert (batch.ref_chosen, batch.margin, batch.step_rows) == (None, None, None)


def test_masks_of_any_kind_lists_and_a_margin():
    plain = as_dict([[5, 6, 1], [5, 7, 1]], [[5, 8, 1], [5, 9, 1]])
    expected = preference_batch_from_dict(plain)
    booleans = {key: value.bool() if key.endswith("mask") else value for key, value in plain.items()}
    lists = {key: value.tolist() for key, value in plain.items()}
    for batch in (booleans, lists, {**plain, "labels": "ignored"}):
        found = preference_batch_from_dict(batch)
        assert torch.equal(found.chosen_ids, expected.chosen_ids)
        assert torch.equal(found.rejected_mask, expected.rejected_mask)
    with_margin = preference_batch_from_dict({**plain, "margin": torch.tensor([1, 2])})
    assert with_margin.margin.tolist() == [1, 2]
    assert with_margin.margin.is_floating_point()


GOOD = as_dict([[5, 6, 1], [5, 7, 1]], [[5, 8, 1], [5, 9, 2, 1]])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chosen_input_ids": ...}, "batch: 'chosen_input_ids' is missing, given are chosen_attention_mask, rejected_"),
        ({"rejected_attention_mask": ...}, "'rejected_attention_mask' is missing, .* expected chosen_input_ids, "),
        ({"chosen_input_ids": torch.ones(4, dtype=torch.long)}, r"'chosen_input_ids' has the shape \[4\]; .* \[B, L\]"),
        (
            {"chosen_attention_mask": torch.ones(2, 3)},
            r"'chosen_attention_mask' has the shape \[2, 3\]; expected the shape of chosen_input_ids, \[2, 4\]",
        ),
        (
            {key: GOOD[key][:1] for key in ("rejected_input_ids", "rejected_attention_mask")},
            r"'rejected_input_ids' has the shape \[1, 5\]; expected as many rows as chosen_input_ids, 2",
        ),
        ({"chosen_input_ids": torch.ones(2, 4)}, "'chosen_input_ids' holds float32; expected token ids, integers"),
        ({"chosen_input_ids": ["5 6", "5 7"]}, "'chosen_input_ids' is no tensor but a list"),
        ({"chosen_input_ids": torch.ones(0, 4, dtype=torch.long)}, r"has the shape \[0, 4\]; .* with a row at least"),
        ({"chosen_attention_mask": torch.zeros(2, 4)}, "'chosen_attention_mask' leaves 0 tokens of row 0; expected 2"),
        (
            {"chosen_input_ids": 3 * GOOD["chosen_input_ids"]},
            "of row 0 begin with different tokens, 15 and 5; expected completions of one prompt",
        ),
        ({"margin": torch.ones(3)}, r"'margin' has the shape \[3\]; expected \[2\], a number per pair"),
    ],
)
def test_what_is_missing_or_misshapen_is_named(change, sentence):
    batch = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    with pytest.raises(InputError, match=sentence) as caught:
        preference_batch_from_dict(batch)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)

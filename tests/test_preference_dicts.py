"""Pairs as plain dictionaries: where the prompt ends, what padding may look like, and what is refused."""

import math

import pytest
import torch

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.errors import InputError
from lit_rlhf.types import from_dict
from lit_rlhf.types.preference_dicts import preference_batch_from_dict
from tests.helpers import VOCABULARY, build


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
    for batch in (booleans, lists, {**plain, "margin": None}):
        found = preference_batch_from_dict(batch)
        assert torch.equal(found.chosen_ids, expected.chosen_ids)
        assert torch.equal(found.rejected_mask, expected.rejected_mask)
    with_margin = preference_batch_from_dict({**plain, "margin": torch.tensor([1, 2])})
    assert with_margin.margin.tolist() == [1, 2]
    assert with_margin.margin.is_floating_point()


GOOD = as_dict([[5, 6, 1], [5, 7, 1]], [[5, 8, 1], [5, 9, 2, 1]])
LABELS = GOOD["rejected_input_ids"].masked_fill(GOOD["rejected_input_ids"] == 5, -100)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chosen_input_ids": ...}, "'chosen_input_ids' is missing, given are chosen_attention_mask, rejected_"),
        ({"rejected_attention_mask": ...}, "'rejected_attention_mask' is missing, .* expected chosen_input_ids, "),
        ({"margins": torch.ones(2)}, "unknown key 'margins'; did you mean 'margin'?"),
        ({"chosen_ids": GOOD["chosen_input_ids"]}, "unknown key 'chosen_ids'; did you mean 'chosen_input_ids'?"),
        ({"labels": torch.ones(2)}, "unknown key 'labels'; expected chosen_input_ids, .*, margin$"),
        ({"chosen_input_ids": torch.ones(4, dtype=torch.long)}, r"'chosen_input_ids' has the shape \[4\]; .* \[B, L\]"),
        (
            {"chosen_attention_mask": torch.ones(2, 3)},
            r"'chosen_attention_mask' has the shape \[2, 3\]; expected \[B, L\], where B is 2 and L is 4",
        ),
        (
            {key: GOOD[key][:1] for key in ("rejected_input_ids", "rejected_attention_mask")},
            r"'rejected_input_ids' has the shape \[1, 5\]; expected \[B, R\], where B is 2",
        ),
        ({"chosen_input_ids": torch.ones(2, 4)}, "'chosen_input_ids' holds float32; expected token ids, integers"),
        ({"chosen_input_ids": ["5 6", "5 7"]}, "'chosen_input_ids' is no tensor but a list"),
        ({"chosen_input_ids": torch.ones(0, 4, dtype=torch.long)}, r"has the shape \[0, 4\]; .* none of them empty"),
        ({"chosen_input_ids": torch.ones(2, 4).bool()}, "'chosen_input_ids' holds bool; expected token ids, integers"),
        ({"rejected_input_ids": LABELS}, "'rejected_input_ids' holds -100 where a token is; expected ids from 0"),
        ({"chosen_attention_mask": 2 * torch.ones(2, 4)}, "'chosen_attention_mask' holds other numbers than 0 and 1"),
        ({"rejected_attention_mask": torch.full((2, 5), 0.5)}, "'rejected_attention_mask' holds other numbers than 0"),
        ({"rejected_attention_mask": -GOOD["rejected_attention_mask"]}, ".* holds other numbers .* expected a mask, 1"),
        ({"chosen_attention_mask": torch.zeros(2, 4)}, "'chosen_attention_mask' leaves 0 tokens of row 0; expected 2"),
        (
            {"chosen_input_ids": 3 * GOOD["chosen_input_ids"]},
            "of row 0 begin with different tokens, 15 and 5; expected completions of one prompt",
        ),
        ({"margin": torch.ones(3)}, r"'margin' has the shape \[3\]; expected \[B\], where B is 2"),
        ({"margin": torch.ones(2, 1)}, r"'margin' has the shape \[2, 1\]; expected \[B\], where B is 2"),
        ({"margin": [1.0, torch.inf]}, "'margin' holds inf; expected finite numbers"),
        ({"margin": [torch.nan, 1.0]}, "'margin' holds nan; expected finite numbers"),
        ({"margin": "large"}, "'margin' is no tensor but a str"),
    ],
)
def test_what_is_missing_or_misshapen_is_named(change, sentence):
    batch = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    for read in (preference_batch_from_dict, from_dict, build(RewardModeling).training_step):
        with pytest.raises(InputError, match=f"^batch: .*{sentence}") as caught:
            read(batch)
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("algorithm", [DPO, RewardModeling])
def test_ids_outside_the_vocabulary_are_refused_where_a_token_is(algorithm):
    module = build(algorithm)
    for side in ("chosen", "rejected"):
        key, attended = f"{side}_input_ids", GOOD[f"{side}_attention_mask"] > 0
        for padding in (-100, VOCABULARY):
            assert module.training_step({**GOOD, key: GOOD[key].masked_fill(~attended, padding)}).isfinite()
        last = {**GOOD, key: GOOD[key].masked_fill(GOOD[key] == 1, VOCABULARY - 1)}
        assert module.training_step(last).isfinite()
        wrong = {**GOOD, key: GOOD[key].masked_fill(GOOD[key] == 1, VOCABULARY)}
        with pytest.raises(InputError, match=f"^batch: '{key}' holds 64 where .* ids below 64, the size of the vocab"):
            module.training_step(wrong)


def test_a_batch_that_is_no_dictionary_is_refused():
    with pytest.raises(InputError, match=r"^batch: it is a list; expected a dictionary of tensors"):
        build(DPO).training_step([GOOD])


def test_dpo_has_no_margin_and_a_reward_model_has():
    sentence = "^batch: 'margin' is given and no loss of DPO has one; leave it out, or train RewardModeling"
    with pytest.raises(InputError, match=sentence):
        build(DPO).training_step({**GOOD, "margin": [0.5, 1.0]})
    assert build(DPO).training_step({**GOOD, "margin": None}).isfinite()
    module = build(RewardModeling)
    for weight in module.models.value_head.parameters():
        torch.nn.init.zeros_(weight)
    found = module.training_step({**GOOD, "margin": [0.5, 1.0]}).item()
    assert found == pytest.approx((math.log1p(math.exp(0.5)) + math.log1p(math.exp(1.0))) / 2, abs=1e-6)

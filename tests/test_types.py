"""The batches: trimming, stacking and selecting keep every number where it belongs."""

from dataclasses import fields, replace

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.errors import InputError
from lit_rlhf.models.scoring import score
from lit_rlhf.types import (
    CompletionBatch,
    Experience,
    PromptBatch,
    SamplingConfig,
    concatenate,
    pad_left,
    pad_right,
)
from tests.helpers import as_completions, build, random_experience, tiny_model, with_columns

TOKEN_FIELDS = ("response_ids", "behavior_logprobs", "old_logprobs", "ref_logprobs", "advantages")


def rows_of(batch):
    """Each row as plain lists: what its masks cover, and its numbers."""
    found = []
    for i in range(len(batch)):
        row = {"prompt": batch.prompt_ids[i][batch.prompt_mask[i]].tolist()}
        row |= {name: getattr(batch, name)[i][batch.response_mask[i]].tolist() for name in TOKEN_FIELDS}
        row |= {name: getattr(batch, name)[i].tolist() for name in ("raw_rewards", "group_ids", "truncated", "version")}
        row["reward_parts"] = batch.reward_parts[i].tolist()
        found.append(row)
    return found


@pytest.mark.parametrize(("left", "right"), [(0, 0), (4, 0), (0, 3), (2, 5)])
def test_trim_drops_the_columns_that_no_mask_covers_and_nothing_else(left, right):
    batch = random_experience()
    trimmed = with_columns(batch, left, right).trim()
    for field in fields(Experience):
        x, expected = getattr(trimmed, field.name), getattr(batch, field.name)
        if isinstance(expected, torch.Tensor):
            assert x.shape == expected.shape, field.name
            assert (x == expected).all(), field.name
        else:
            assert x is expected, field.name


def test_trim_of_a_few_rows_keeps_their_numbers():
    batch = random_experience()
    some = torch.tensor([2, 4])  # prompts of 1 and 5 tokens, responses of 1 and 2
    trimmed = batch[some].trim()
    assert trimmed.prompt_ids.shape == (2, 5)
    assert trimmed.response_ids.shape == trimmed.advantages.shape == (2, 2)
    assert rows_of(trimmed) == [rows_of(batch)[i] for i in some]
    short = batch[torch.tensor([2])].trim()
    assert (short.prompt_ids.shape, short.response_ids.shape) == ((1, 1), (1, 1))


def test_trim_keeps_holes_and_cuts_rewards_per_token():
    batch = random_experience(lengths=(4, 2), prompt_lengths=(1, 2))
    mask = batch.response_mask.clone()
    mask[0, 1:3] = False  # a tool's output
    batch = with_columns(replace(batch, response_mask=mask, rewards=batch.advantages), 1, 2).trim()
    assert batch.response_mask.tolist() == mask.tolist()
    assert batch.rewards.shape == (2, 4)


def test_trim_never_cuts_the_parts_of_the_reward():
    batch = random_experience(lengths=(1, 1), prompt_lengths=(1, 1))
    parts = torch.arange(10.0).view(2, 5)
    assert (replace(batch, reward_parts=parts).trim().reward_parts == parts).all()


def test_trim_of_rows_without_a_valid_token_leaves_one_column():
    batch = random_experience(lengths=(0, 0), prompt_lengths=(2, 3))
    trimmed = with_columns(batch, 2, 4).trim()
    assert (trimmed.prompt_ids.shape, trimmed.response_ids.shape) == ((2, 3), (2, 1))
    assert not trimmed.response_mask.any()


def test_trim_does_not_change_the_loss():
    module = build(DAPO, kl_coef=0.1, entropy_coef=0.1)
    batch = with_columns(random_experience(model=module.models.policy), 3, 4)
    assert module.training_step(batch.trim()).item() == pytest.approx(module.training_step(batch).item(), abs=1e-12)


def test_concatenate_aligns_prompts_on_the_right_and_responses_on_the_left():
    first = random_experience(lengths=(3, 1), prompt_lengths=(2, 1), seed=1)
    second = random_experience(lengths=(6, 2, 4), prompt_lengths=(5, 3, 4), seed=2)

    both = concatenate([first, second, first])

    assert rows_of(both) == rows_of(first) + rows_of(second) + rows_of(first)
    assert both.prompt_mask[:, -1].all()
    assert both.response_mask[:, 0].all()
    assert both.prompt_ids.shape == (7, 5)
    assert both.response_ids.shape == both.advantages.shape == (7, 6)
    assert not both.prompt_mask[0, :3].any()
    assert not both.response_mask[0, 3:].any()
    assert type(both) is Experience


def test_concatenated_rows_score_as_they_did():
    model = tiny_model().double()
    parts = [random_experience(lengths=(3, 1), prompt_lengths=(2, 1)), random_experience(seed=3)]

    def scored(rows):
        return score(model, rows).logprobs

    both = scored(concatenate(parts))
    torch.testing.assert_close(both[:2, :3], scored(parts[0]), atol=1e-9, rtol=0)
    torch.testing.assert_close(both[2:], scored(parts[1]), atol=1e-9, rtol=0)


def test_concatenate_keeps_optional_fields_only_where_all_have_them():
    first, second = random_experience(seed=1), random_experience(seed=2)
    assert concatenate([first, replace(second, ref_logprobs=None)]).ref_logprobs is None
    assert concatenate([first, second]).ref_logprobs is not None
    returns = concatenate([replace(first, returns=first.advantages), replace(second, returns=second.advantages)])
    assert (returns.returns == returns.advantages).all()


def test_concatenate_drops_the_counts_of_a_step():
    """They are those of one optimiser step, and the rows of several are none."""
    batch = replace(random_experience(), step_tokens=torch.tensor(24), step_rows=torch.tensor(6))
    both = concatenate([batch, batch])
    assert both.step_tokens is None
    assert both.step_rows is None


def test_rows_are_selected_by_slice_index_and_mask():
    batch = replace(random_experience(), step_tokens=torch.tensor(24), step_rows=torch.tensor(6))
    every = rows_of(batch)
    for index, expected in [
        (slice(1, 3), every[1:3]),
        (torch.tensor([5, 0, 5]), [every[5], every[0], every[5]]),
        (torch.tensor([True, False, False, True, False, False]), [every[0], every[3]]),
    ]:
        chosen = batch[index]
        assert rows_of(chosen) == expected
        assert len(chosen) == len(expected)
        assert (chosen.step_tokens, chosen.step_rows) == (24, 6)
        assert chosen.returns is None


def test_batches_move_to_a_device_with_all_their_tensors():
    batch = replace(random_experience(), step_tokens=torch.tensor(24), returns=torch.zeros(6, 7))
    moved = batch.to("meta")
    for field in fields(moved):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert (after is None) if before is None else (after.device.type == "meta"), field.name
    completions = as_completions(batch).to("meta")
    assert isinstance(completions, CompletionBatch)
    assert completions.response_ids.device.type == "meta"
    prompts = PromptBatch([[1, 2], [3]], {"prompt": ["a", "b"]}, [4, 5])
    assert prompts.to("meta") is prompts
    assert len(prompts) == 2


def test_lengths_and_spread():
    batch = random_experience(lengths=(2, 0, 3), prompt_lengths=(1, 1, 1), group_size=3)
    assert batch.lengths.tolist() == [2, 0, 3]
    spread = batch.spread(torch.tensor([1.5, float("nan"), -2.0]))
    assert spread.tolist() == [[1.5, 1.5, 0], [0, 0, 0], [-2, -2, -2]]


def test_padding():
    ids, mask = pad_left([[1, 2, 3], [4], []], value=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False] * 3]
    ids, mask = pad_right([[1, 2, 3], [4], []], value=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert (ids.dtype, mask.dtype) == (torch.long, torch.bool)


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"group_size": 0}],
)
def test_sampling_refuses_what_cannot_be_sampled_with(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(InputError, match=f"{name} must be .*got {value}"):
        SamplingConfig(**wrong)


@pytest.mark.parametrize(
    ("sampling", "truncates"),
    [
        ({}, False),
        ({"temperature": 0.7}, False),
        ({"top_p": 0.9}, True),
        ({"top_k": 5}, True),
        ({"temperature": 0}, True),
    ],
)
def test_what_samples_from_another_distribution_than_it_scores(sampling, truncates):
    assert SamplingConfig(**sampling).truncates_distribution is truncates

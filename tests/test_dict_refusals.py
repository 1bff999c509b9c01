"""Plain dictionaries that cannot be used: every mistake is answered by one sentence that names the key."""

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.errors import InputError
from lit_rlhf.types import from_dict
from tests.helpers import PAD, build
from tests.test_dict_formats import OFF_POLICY
from tests.test_dicts import WIDTH, groups, rows

ROWS = {key: value.nan_to_num() for key, value in rows().items()} | {"input_ids": rows()["input_ids"].clamp(min=0)}
LONG = torch.long


@pytest.mark.parametrize(
    ("make", "changes", "sentence"),
    [
        (
            rows,
            {"input_ids": None},
            "'input_ids' is missing, given are attention_mask, .*; expected input_ids, attenti",
        ),
        (rows, {"attention_mask": None}, "'attention_mask' is missing"),
        (rows, {"rewards": None}, "'rewards' is missing"),
        (rows, {"old_log_probs": None}, "'old_log_probs' is missing, and so is 'behavior_log_probs'; expected either"),
        (rows, {"old_logprobs": ROWS["values"]}, "unknown key 'old_logprobs'; did you mean 'old_log_probs'?"),
        (rows, {"labels": ROWS["input_ids"]}, "unknown key 'labels'; expected input_ids, attention_mask, rewards, old"),
        (rows, {"input_ids": torch.ones(6, dtype=LONG)}, r"'input_ids' has the shape \[6\]; expected \[B, L\]"),
        (rows, {"input_ids": torch.ones(3, 1, dtype=LONG)}, r"'input_ids' has the shape \[3, 1\]; .* L of 2 at least"),
        (
            rows,
            {"input_ids": torch.ones(0, 6, dtype=LONG)},
            r"'input_ids' has the shape \[0, 6\]; .* none of them empty",
        ),
        (
            rows,
            {"attention_mask": torch.ones(2, 6)},
            r"'attention_mask' has .* \[2, 6\]; .*\[B, L\], where B is 3 and L",
        ),
        (
            rows,
            {"attention_mask": torch.ones(3, 7)},
            r"'attention_mask' has .* \[3, 7\]; expected .* B is 3 and L is 6",
        ),
        (
            rows,
            {"attention_mask": torch.zeros(3, 6)},
            "'attention_mask' leaves no token of row 0; expected one at least",
        ),
        (rows, {"attention_mask": 2 * torch.ones(3, 6)}, "'attention_mask' holds other numbers than 0 and 1"),
        (rows, {"response_mask": torch.ones(3)}, r"'response_mask' has the shape \[3\]; expected \[B, L\]"),
        (
            rows,
            {"rewards": torch.ones(3, 5)},
            r"'rewards' has the shape \[3, 5\]; expected \[B, L\] or \[B\], where B is 3",
        ),
        (rows, {"rewards": torch.ones(2)}, r"'rewards' has the shape \[2\]; expected"),
        (rows, {"rewards": torch.tensor(1.0)}, r"'rewards' has the shape \[\]; expected"),
        (rows, {"rewards": torch.tensor([1.0, torch.nan, 0])}, "'rewards' holds nan; expected finite numbers"),
        (rows, {"rewards": "good"}, "'rewards' is no tensor but a str"),
        (rows, {"old_log_probs": torch.ones(3)}, r"'old_log_probs' has the shape \[3\]; expected \[B, L\], where"),
        (rows, {"old_log_probs": ROWS["values"] - torch.inf}, "'old_log_probs' holds -inf where a token is"),
        (rows, {"values": torch.ones(3, 4)}, r"'values' has the shape \[3, 4\]"),
        (rows, {"old_values": torch.ones(3, 6, 1)}, r"'old_values' has the shape \[3, 6, 1\]"),
        (rows, {"advantages": torch.ones(4)}, r"'advantages' has the shape \[4\]; expected \[B, L\] or \[B\]"),
        (rows, {"behavior_log_probs": torch.ones(3, 6, 2)}, r"'behavior_log_probs' has the shape \[3, 6, 2\]"),
        (rows, {"input_ids": ROWS["input_ids"].float()}, "'input_ids' holds float32; expected token ids, integers"),
        (rows, {"input_ids": ROWS["input_ids"] > 0}, "'input_ids' holds bool; expected token ids, integers"),
        (rows, {"input_ids": ROWS["input_ids"] - 100}, "'input_ids' holds -95 where a token is; expected ids from 0"),
        (groups, {"prompt_ids": None}, "'prompt_ids' is missing, given are response_ids"),
        (groups, {"response_masks": None}, "'response_masks' is missing"),
        (groups, {"response_mask": torch.ones(2, 2, 4)}, "unknown key 'response_mask'; did you mean 'response_masks'?"),
        (
            groups,
            {"response_ids": torch.ones(2, 4, dtype=LONG)},
            r"'response_ids' has .*; expected \[B, G, R\], where B is 2",
        ),
        (groups, {"response_ids": torch.ones(3, 2, 4, dtype=LONG)}, r"'response_ids' has the shape \[3, 2, 4\]"),
        (groups, {"response_ids": torch.ones(2, 2, 4)}, "'response_ids' holds float32"),
        (groups, {"rewards": torch.ones(4)}, r"'rewards' has the shape \[4\]; expected \[B, G, R\] or \[B, G\]"),
        (
            groups,
            {"rewards": torch.ones(2, 3)},
            r"'rewards' has the shape \[2, 3\]; .* where B is 2 and G is 2 and R is 4",
        ),
        (groups, {"response_masks": torch.ones(2, 2, 5)}, r"'response_masks' has the shape \[2, 2, 5\]"),
        (groups, {"prompt_masks": torch.ones(2, 2)}, r"'prompt_masks' has the shape \[2, 2\]; expected \[B, P\]"),
        (groups, {"prompt_masks": torch.zeros(2, 3)}, "'prompt_masks' leaves no token of prompt 0"),
        (groups, {"prompt_ids": torch.zeros(2, 3, dtype=LONG)}, "'prompt_ids' leaves no token of prompt 0"),
        (groups, {"greedy_rewards": torch.ones(4)}, r"'greedy_rewards' has the shape \[4\]; expected \[B\]"),
    ],
)
def test_a_batch_that_cannot_be_used_is_refused_in_a_sentence(make, changes, sentence):
    batch = make() | changes
    with pytest.raises(InputError, match=f"^batch: {sentence}") as caught:
        from_dict(batch, PAD)
    assert "\n" not in str(caught.value)


def test_keys_of_no_format_are_refused():
    with pytest.raises(InputError, match=r"^batch: it is a list; expected a dictionary of tensors"):
        build(PPO).training_step([torch.ones(2)])
    for batch in ({}, {"rewards": [1.0]}, {"text": "a"}, {"input_ids": [[1]], "prompt_ids": [[1]]}):
        with pytest.raises(
            InputError, match=r"^batch: the keys .* are of no format; expected input_ids, .*; or prompt_i"
        ):
            from_dict(batch)


@pytest.mark.parametrize(
    ("algorithm", "batch", "sentence"),
    [
        (GRPO, rows(), "GRPO compares the samples of one prompt with each other and there is one per prompt; expected"),
        (RLOO, rows(), "RLOO compares"),
        (PPO, rows(**OFF_POLICY), "PPO corrects by 'behavior_log_probs' with algo.importance_correction=token or seq"),
        (PPO, rows(behavior_log_probs=OFF_POLICY["behavior_log_probs"]), "PPO corrects by 'behavior_log_probs' with"),
        (PPO, rows(behavior_log_probs=torch.zeros(3, WIDTH)), "PPO corrects by 'behavior_log_probs' with"),
        (
            PPO,
            rows(input_ids=torch.full((3, WIDTH), 64)),
            "token id 64 is given; expected ids below 64, the size of the",
        ),
    ],
)
def test_a_batch_that_the_algorithm_cannot_learn_from_is_refused(algorithm, batch, sentence):
    with pytest.raises(InputError, match=f"^batch: {sentence}"):
        build(algorithm).training_step(batch)

"""What scores held-out completions: the rewards, then what the data itself can verify."""

from decimal import Decimal
from functools import partial

import pytest
import torch

from lit_rlhf import GRPO
from lit_rlhf.data import RowsDataModule
from lit_rlhf.rewards import DataRewards, Judges, RewardFunctions, exact_match, numeric_answer, verifier
from tests.helpers import NumberTokenizer, pretend_trainer, tiny_model

ROWS = (["1+1=", "1+2="], [" 2", "is 4"], [[5], [7, 7]], {"answer": ["2", "3"]})


def short(completions, **kwargs):
    return [-float(len(c)) for c in completions]


def says_nothing(completions, **kwargs):
    return [None] * len(completions)


@verifier
def never(completions, **kwargs):
    return [0.0] * len(completions)


def test_the_datas_verifiers_count_nothing_towards_the_reward():
    judges = Judges(RewardFunctions([short], [2.0]), [exact_match])
    total, parts = judges(*ROWS)
    assert total.tolist() == [-4, -8]
    assert judges.names == ["short", "exact_match"]
    torch.testing.assert_close(parts, torch.tensor([[-2.0, 1.0], [-4.0, 0.0]]))
    assert judges.accuracy(parts).tolist() == [1, 0]


def test_a_row_that_only_a_verifier_can_judge_has_no_reward():
    total, parts = Judges(RewardFunctions([says_nothing]), [exact_match])(*ROWS)
    assert total.isnan().all()
    assert parts[:, 1].tolist() == [1, 0]


@pytest.mark.parametrize("given", [exact_match, "lit_rlhf.rewards.exact_match", partial(exact_match)])
def test_a_verifier_that_is_trained_on_already_is_not_asked_twice(given):
    judges = Judges(RewardFunctions([short, given]), [exact_match])
    assert judges.names == ["short", "exact_match"]
    assert judges(*ROWS)[0].tolist() == [-1, -4], "it counts: it is a reward"


def test_the_rewards_own_verifier_decides_what_is_right():
    judges = Judges(RewardFunctions([never]), [exact_match])
    assert judges.accuracy(judges(*ROWS)[1]).tolist() == [0, 0]


def test_names_stay_apart():
    def exact_match(completions, **kwargs):
        return [0.0] * len(completions)

    assert Judges(RewardFunctions([exact_match]), [numeric_answer, never]).names == [
        "exact_match",
        "numeric_answer",
        "never",
    ]
    from lit_rlhf.rewards import exact_match as real

    assert Judges(RewardFunctions([exact_match]), [real]).names == ["exact_match", "exact_match_2"]


def test_without_rewards_the_verifiers_are_them():
    assert Judges(None, [exact_match])(*ROWS)[0].tolist() == [1, 0]
    assert not Judges(None)
    assert Judges(RewardFunctions([short]))


def test_what_cannot_be_verified_has_no_accuracy():
    judges = Judges(RewardFunctions([short]))
    assert judges.accuracy(judges(*ROWS)[1]) is None


@pytest.mark.parametrize(
    ("verifiers", "expected"),
    [
        ([exact_match], ["so 1,000", "7", ""]),
        ([numeric_answer], [Decimal(1000), Decimal(7), None]),
        ([partial(numeric_answer)], [Decimal(1000), Decimal(7), None]),
        ([], ["so 1,000", "7", ""]),
    ],
)
def test_completions_vote_for_what_the_verifier_reads(verifiers, expected):
    judges = Judges(RewardFunctions([short]), verifiers)
    assert judges.answers(["so 1,000 ", "7", " "]) == expected


def test_a_verifier_says_what_the_answer_is():
    @verifier(answer=lambda text: text[-1:] or None)
    def last_letter(completions, **kwargs):
        return [float(text.endswith("b")) for text in completions]

    judges = Judges(None, [last_letter])
    assert judges.answers(["xb", ""]) == ["b", None]
    assert judges.accuracy(judges(["", ""], ["xb", ""], [[1], [1]], {})[1]).tolist() == [1, 0]


@pytest.mark.parametrize("given", ["functions", "none"])
def test_the_verifiers_have_the_timeout_of_the_rewards(given):
    rewards = RewardFunctions([short], timeout=0.5) if given == "functions" else DataRewards(timeout=0.5)
    assert [functions.timeout for functions in Judges(rewards, [exact_match]).scored_by][-1] == 0.5
    module = GRPO(policy=tiny_model(), tokenizer=NumberTokenizer(), reward_funcs=rewards)
    pretend_trainer(module)._trainer.datamodule = RowsDataModule(
        [{"prompt": "5", "answer": "6"}], reward_funcs=[exact_match]
    )
    module.setup("fit")
    assert module.rewards.timeout == 0.5
    assert {functions.timeout for functions in module.judges.scored_by} == {0.5}


def test_reward_models_of_either_kind_are_moved():
    class Movable:
        __name__ = "movable"
        device = None

        def to(self, device):
            self.device = device

        def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

    first, second = Movable(), Movable()
    Judges(RewardFunctions([first]), [second]).to("meta")
    assert (first.device, second.device) == ("meta", "meta")

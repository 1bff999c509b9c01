"""Tasks of reasoning_gym: the library's own problems and scores, splits that do not meet, and what is refused."""

import json
import sys

import pytest
import torch

from lit_rlhf.data import ReasoningGymData
from lit_rlhf.data.reasoning import ReasoningGymScore, extract_answer
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import RewardFunctions
from tests.runs import QUIET, fork, metrics_of

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def questions(rows):
    return [row["prompt"] for row in rows]


def test_the_splits_are_different_problems_and_the_same_for_the_same_seed():
    data = ReasoningGymData("chain_sum", {"max_digits": 2}, train_size=40, held_out=10, seed=3)
    train, test = questions(data.train_rows), questions(data.held_out_rows)
    assert (len(set(train)), len(set(test))) == (40, 10)
    assert not set(train) & set(test)
    again = ReasoningGymData("chain_sum", {"max_digits": 2}, train_size=40, held_out=10, seed=3)
    assert (questions(again.train_rows), questions(again.held_out_rows)) == (train, test)
    next_seed = ReasoningGymData("chain_sum", {"max_digits": 2}, train_size=40, held_out=10, seed=4)
    assert len(set(questions(next_seed.train_rows)) & set(train)) < 5, "the library's seeds overlap, ours do not"


def test_a_task_with_few_problems_keeps_the_splits_apart_and_says_so(capsys):
    data = ReasoningGymData("chain_sum", SMALL, train_size=400, held_out=30)
    train, test = questions(data.train_rows), questions(data.held_out_rows)
    assert not set(train) & set(test)
    assert len(test) == 30
    assert 0 < len(train) < 400
    assert f"chain_sum has {len(train)} different training problems instead of 400" in capsys.readouterr().out


def test_parameters_decide_the_difficulty():
    data = ReasoningGymData("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 4, "max_digits": 4}, 20, 0)
    for row in data.train_rows:
        terms = row["metadata"]["expression"].replace("-", "+").split("+")
        assert [len(term.strip()) for term in terms] == [4, 4, 4]


def test_scores_are_the_librarys_and_accuracy_is_a_score_of_one():
    data = ReasoningGymData("chain_sum", SMALL, train_size=5, held_out=0)
    rows = [{name: value for name, value in row.items() if name != "prompt"} for row in data.train_rows]
    right = [row["answer"] for row in rows]
    completions = [
        right[0],
        f"so <answer> {right[1]} </answer>.",
        f"Answer: 17\nThe answer: {right[2]}",
        f"{right[3]} or so",
        "",
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    rewards = RewardFunctions(data.reward_funcs)
    total, parts = rewards(questions(data.train_rows), completions, [[0]] * 5, columns)
    partial = len(right[3]) / len(completions[3])  # the library's rule for a right answer with more around it
    torch.testing.assert_close(total, torch.tensor([1.0, 1.0, 1.0, partial, 0.0]))
    assert rewards.accuracy(parts).tolist() == [1, 1, 1, 0, 0]
    assert rewards.names == ["chain_sum"]
    chat = [[{"role": "assistant", "content": text}] for text in completions]
    assert data.reward_funcs[0](chat, **columns) == pytest.approx(total.tolist())
    blocks = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in completions]
    assert data.reward_funcs[0](blocks, **columns) == pytest.approx(total.tolist())


def test_an_answer_at_which_the_scorer_fails_scores_nothing():
    row = ReasoningGymData("prime_factorization", train_size=1, held_out=0).train_rows[0]
    score = ReasoningGymScore("prime_factorization")
    columns = {name: [row[name]] * 2 for name in ("question", "answer", "metadata")}
    assert score(["nonsense", row["answer"]], **columns) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> no, <answer>\n2\n</answer>", "2"),
        ("Answer: 1, no, answer: 2", "2"),
        ("Answer: 1 <answer>2</answer>", "2"),
        (" a b ", "a b"),
        ("Answer:", ""),
        ("<answer>2", "<answer>2"),
    ],
)
def test_where_the_answer_of_a_completion_stands(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"task": "chain_sums"}, "data.task: reasoning_gym has no task 'chain_sums'; did you mean 'chain_sum'"),
        ({"params": {"max_digit": 2}}, "chain_sum has no parameter 'max_digit'; did you mean 'max_digits'"),
        ({"params": {"seed": 2}}, "data.params: 'seed' is not the task's own; give data.seed=..."),
        ({"params": {"size": 2}}, "'size' is not the task's own; give data.train_size=... and data.held_out=..."),
        (
            {"params": {"min_terms": 9}},
            r"data.params: chain_sum refuses \{'min_terms': 9\}: max_terms must be >= min_terms",
        ),
        ({"params": {"min_terms": "two"}}, r"data.params: chain_sum refuses \{'min_terms': 'two'\}"),
        ({"train_size": 0}, "data.train_size must be at least 1"),
        (
            {"task": "coin_flip", "params": {"min_trials": 1, "max_trials": 1}, "held_out": 50},
            "are held out; give a smaller",
        ),
    ],
)
def test_what_the_library_has_not_is_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        ReasoningGymData(**{"task": "chain_sum", "train_size": 20, "held_out": 2, **arguments})


def test_from_the_command_line(tmp_path):
    """The task's letters are unknown to the tiny tokenizer, its numbers are not."""
    task = ("data=reasoning_gym", "data.task=chain_sum", f"data.params={json.dumps(SMALL).replace(chr(34), '')}")
    sizes = ("data.train_size=20", "data.held_out=8", "algo.prompts_per_rollout=4", "algo.group_size=2")
    ended = fork(
        *task, *sizes, "trainer.max_epochs=1", "rollout.max_new_tokens=4", *QUIET, "hydra.run.dir=run", cwd=tmp_path
    )
    assert ended.code == 0, ended.err
    rows = metrics_of(tmp_path / "run")
    assert any("reward/accuracy" in row for row in rows)
    assert any("val/rewards/chain_sum_greedy" in row for row in rows)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(InputError, match=r"data=reasoning_gym needs .*: pip install 'lit_rlhf\[reasoning_gym\]'"):
        ReasoningGymData("chain_sum")

"""Reward functions: which keywords they get, how they add up, and what is refused."""

import functools
import math
import re
import sys

import numpy as np
import pytest
import torch

from lit_rlhf.errors import InputError
from lit_rlhf.rewards import DataRewards, RewardFunctions, exact_match, numeric_answer, reward_functions, verifier

PROMPTS, COMPLETIONS, IDS = ["1+1=", "1+2=", "1+3="], ["2", "3", "5"], [[1], [2], [3]]
COLUMNS = {"prompt": PROMPTS, "answer": ["2", "3", "4"], "level": [1, 2, 3]}


def score(funcs, weights=None, columns=COLUMNS):
    return RewardFunctions(funcs, weights)(PROMPTS, COMPLETIONS, IDS, columns)


def returning(value):
    def reward(**_):
        return value

    return reward


def refusal(funcs, weights=None):
    with pytest.raises(InputError) as caught:
        score(funcs, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_function_gets_the_keywords_it_names():
    def named(completions, level, answer=None, missing="default"):
        assert (answer, missing) == (["2", "3", "4"], "default")
        return [float(c) * n for c, n in zip(completions, level, strict=True)]

    total, parts = score(named)
    assert total.tolist() == [2, 6, 15]
    assert parts.tolist() == [[2], [6], [15]]
    assert total.dtype == parts.dtype == torch.float32


def test_a_function_with_keyword_arguments_gets_everything_but_prompt():
    seen = {}

    def everything(completions, **kwargs):
        seen.update(kwargs, completions=completions)
        return [0, 0, 0]

    score(everything)
    told = {"trainer_state", "log_metric", "log_extra"}
    assert {name: value for name, value in seen.items() if name not in told} == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": IDS,
        "answer": ["2", "3", "4"],
        "level": [1, 2, 3],
    }


def test_trl_style_functions_work_as_they_are():
    def trl(prompts, completions, completion_ids=None, answer=None, **kwargs):
        assert completion_ids == IDS
        return [1.0 if c == a else 0.0 for c, a in zip(completions, answer, strict=True)]

    assert score([trl])[0].tolist() == [1, 1, 0]


def test_a_column_cannot_replace_what_is_scored():
    def completion(completions):
        return [float(c) for c in completions]

    assert score(completion, columns={"completions": ["9", "9", "9"]})[0].tolist() == [2, 3, 5]


def test_functions_cannot_change_what_others_see():
    def vandal(completions, answer, **_):
        completions[:] = answer[:] = ["x"] * 3
        return [0, 0, 0]

    total, _ = score([vandal, exact_match])
    assert total.tolist() == [1, 1, 0]
    assert COLUMNS["answer"] == ["2", "3", "4"]


def test_weights_and_none():
    total, parts = score([returning([1, None, None]), returning([10, 20, None]), returning([None] * 3)], [0.5, -2, 7])
    nan = math.nan
    torch.testing.assert_close(total, torch.tensor([0.5 - 20, -40, nan]), equal_nan=True)
    torch.testing.assert_close(parts, torch.tensor([[1, 10, nan], [nan, 20, nan], [nan, nan, nan]]), equal_nan=True)


def test_a_zero_weight_only_reports():
    total, parts = score([returning([1, 2, 3]), returning([4, 5, 6])], [1, 0])
    assert total.tolist() == [1, 2, 3]
    assert parts[:, 1].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    "value",
    [
        (1, 0.5, True),
        [np.float32(1), np.float64(0.5), np.bool_(True)],
        [torch.tensor(1), torch.tensor(0.5, requires_grad=True), torch.tensor(True)],
        torch.tensor([1, 0.5, 1], requires_grad=True),
        torch.tensor([1, 0.5, 1], dtype=torch.bfloat16),
        np.array([1, 0.5, 1]),
        np.array([1, 0.5, True], dtype=object),
    ],
)
def test_what_counts_as_numbers(value):
    total, _ = score(returning(value))
    assert total.tolist() == [1, 0.5, 1]


def test_no_rows():
    total, parts = RewardFunctions([exact_match, numeric_answer])([], [], [], {"answer": []})
    assert total.shape == (0,)
    assert parts.shape == (0, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "reward function reward returned 2 rewards; expected a list of 3 numbers or None"),
        (torch.ones(4), "returned 4 rewards; expected a list of 3 numbers"),
        ([1, "good", 0], "returned 'good' (str) for row 1; expected a number, or None where it does not apply"),
        ([1, 2, [3]], "returned [3] (list) for row 2; expected a number"),
        ([1, 2, 3j], "(complex) for row 2; expected a number"),
        ([torch.ones(1)] * 3, "(Tensor) for row 0; expected a number"),
        ([1, math.nan, 3], "returned nan for row 1; expected a finite number, or None"),
        (np.array([1, 2, np.inf]), "returned inf for row 2; expected a finite number"),
        ([-1e39, 0, 0], "returned -1e+39 for row 0; expected a finite number"),
        ([10**400, 0, 0], "for row 0; expected a finite number"),
        (1.0, "returned a float; expected a list of 3 numbers or None"),
        (None, "returned a NoneType; expected a list"),
        ("abc", "returned a str; expected a list"),
        ({0: 1, 1: 1, 2: 1}, "returned a dict; expected a list"),
        (torch.ones(3, 1), "returned a Tensor of shape (3, 1); expected a list of 3 numbers"),
        (torch.tensor(1.0), "returned a Tensor of shape (); expected a list of 3 numbers"),
        (np.ones((3, 2)), "returned a ndarray of shape (3, 2); expected a list of 3 numbers"),
        ((x for x in (1, 2, 3)), "returned a generator; expected a list"),
    ],
)
def test_bad_rewards_are_refused(value, message):
    assert message in refusal(returning(value))


def test_an_exception_inside_is_named_and_chained():
    def broken(completions):
        return {}["key"]

    with pytest.raises(InputError, match="reward function broken raised KeyError: 'key'") as caught:
        score(broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_missing_column_is_named():
    def needy(completions, solution):
        return []

    message = refusal(needy)
    assert "reward function needy needs 'solution', which the data does not have" in message
    assert "it has answer, completion_ids, completions, level, prompts" in message


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "reward weights: 2 needed, one for each of exact_match, numeric_answer, got 1"),
        ([1, 2, 3], "got 3"),
        ([1, "2"], "the weight of numeric_answer must be a finite number, got '2'"),
        ([math.nan, 1], "the weight of exact_match must be a finite number, got nan"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    assert message in refusal([exact_match, numeric_answer], weights)


@pytest.mark.parametrize(("funcs", "message"), [([], "at least one is needed"), ([3], "an import string, got 3")])
def test_what_is_no_function_is_refused(funcs, message):
    assert message in refusal(funcs)


@pytest.mark.parametrize("funcs", [5, {exact_match}])
def test_what_holds_no_functions_is_refused(funcs):
    assert "reward functions: give callables or import strings, got" in refusal(funcs)


def test_weights_that_weight_nothing_are_refused():
    with pytest.raises(InputError, match="reward weights: there are no reward functions to weight"):
        reward_functions(None, [1.0])
    with pytest.raises(InputError, match="reward weights belong to funcs"):
        reward_functions(RewardFunctions(exact_match), [2.0])
    assert reward_functions(exact_match, [2.0]).weights == [2.0]
    with pytest.raises(InputError, match="reward weights: there are no reward functions to weight"):
        reward_functions(DataRewards(), [1.0])


def test_a_timeout_without_functions_is_kept():
    assert reward_functions(None).timeout == 300
    assert reward_functions(reward_functions(None, timeout=0.5)).timeout == 0.5
    with pytest.raises(InputError, match=r"reward\.timeout must be above 0, got -1"):
        reward_functions(None, timeout=-1)


def test_the_datas_own_completions_are_no_columns():
    """As in TRL: a function that names one of them would read another completion than it scores."""
    seen = {}

    def everything(completions, **kwargs):
        seen.update(kwargs)
        return [0, 0, 0]

    def reads(completions, completion):
        return [0, 0, 0]

    row = {"prompt": "p", "completion": "c", "completion_ids": [9], "answer": "1"}
    rewards = RewardFunctions(everything)
    rewards(PROMPTS, COMPLETIONS, IDS, {name: [value] * 3 for name, value in row.items()})
    assert (seen["completion_ids"], "completion" in seen) == (IDS, False)
    rewards.check([row])
    with pytest.raises(InputError, match="reads needs 'completion', which the data does not have; it has answer, comp"):
        RewardFunctions(reads).check([row])


class Judge:
    def __call__(self, completions):
        return [0.0] * len(completions)


def test_names_are_unique():
    def reward_2(**_):
        return [0, 0, 0]

    funcs = [
        returning([0]),
        reward_2,
        returning([1]),
        returning([2]),
        functools.partial(exact_match),
        Judge(),
        lambda: 0,
    ]
    names = ["reward", "reward_2", "reward_3", "reward_4", "exact_match", "Judge", "lambda"]
    assert RewardFunctions(funcs).names == names


def test_accuracy_is_the_first_verifier():
    assert RewardFunctions(returning([1, 2, 3])).accuracy(torch.ones(3, 1)) is None

    @verifier
    def mine(completions):
        return [True, False, None]

    rewards = RewardFunctions([returning([5, 5, 5]), functools.partial(exact_match), mine], [1, 0, 0])
    total, parts = rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert total.tolist() == [5, 5, 5]
    assert rewards.accuracy(parts).tolist() == [1, 1, 0]
    assert RewardFunctions([mine, exact_match]).accuracy(parts[:, 1:]).tolist() == [1, 1, 0]
    assert mine(["x"]) == [True, False, None]  # the decorator leaves the function as it is


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "user_rewards.py").write_text(
        "def brevity(completions):\n    return [-len(c) for c in completions]\nlimit = 3\n"
    )
    (tmp_path / "user_broken.py").write_text("1 / 0\n")
    (tmp_path / "user_needs.py").write_text("import surely_not_installed\n")
    yield tmp_path
    for name in ("user_rewards", "user_broken", "user_needs"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("here")
def test_functions_are_imported_from_the_current_directory():
    rewards = RewardFunctions(["user_rewards.brevity", "lit_rlhf.rewards.exact_match"])
    assert rewards.names == ["brevity", "exact_match"]
    total, _ = rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert total.tolist() == [0, 0, -1]
    assert RewardFunctions("user_rewards.brevity").names == ["brevity"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "user_reward.brevity",
            "there is no module 'user_reward', neither installed nor in .*; the nearest is 'user_rewards'",
        ),
        ("user_rewards.inner.brevity", "there is no module 'user_rewards.inner'"),
        ("user_rewards.brevty", "module 'user_rewards' has no function 'brevty'; the nearest is 'brevity'"),
        (
            "user_rewards.limit",
            "module 'user_rewards' has no function 'limit', only a value of type int; the nearest is 'brevity'",
        ),
        ("user_broken.reward", "importing user_broken raised ZeroDivisionError: division by zero"),
        ("user_needs.reward", "user_needs cannot be imported, No module named 'surely_not_installed'"),
        ("brevity", "'brevity' is no import string: write 'my_file.my_function'"),
        (".brevity", "is no import string"),
        ("./user_rewards.py", "is a file and no import string: write 'user_rewards.my_function', without .py"),
        ("user_rewards.py", "write 'user_rewards.my_function', without .py"),
        ("user_rewards.py:brevity", "write 'user_rewards.brevity', without .py"),
        ("rewards/mine.py.ok", "write 'rewards.mine.ok', without .py"),
        ("user_rewards.", "is no import string"),
    ],
)
def test_import_strings_that_lead_nowhere_are_refused(path, message):
    assert re.search(message, refusal(path)), refusal(path)

"""What counts as the answer."""

import sys
import threading
import time
from decimal import Decimal

import pytest

from lit_rlhf.errors import InputError
from lit_rlhf.rewards import RewardFunctions, exact_match, final_number, math_expression, numeric_answer, text_of


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("46", "46", 1.0),
        (" 46\n", "46", 1.0),
        ("46", " 46 ", 1.0),
        ("46", 46, 1.0),
        ("46.0", "46", 0.0),
        ("4 6", "46", 0.0),
        ("460", "46", 0.0),
        ("", "46", 0.0),
    ],
)
def test_exact_match(completion, answer, reward):
    assert exact_match(completions=[completion], answer=[answer], prompts=["46"]) == [reward]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("72.", "72"),
        ("72.0", "72"),
        ("72.50", "72.5"),
        (".5", "0.5"),
        ("007", "7"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("$5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("50%", "50"),
        ("$1,234.50.", "1234.5"),
        ("1,000,000", "1000000"),
        ("3,4,5", "5"),
        ("1,2345", "2345"),
        ("10-7", "7"),
        ("10 - 7", "7"),
        ("(3)-2", "2"),
        ("covid-19", "19"),
        ("x=-3", "-3"),
        (r"\boxed{72}", "72"),
        ("**72** apples", "72"),
        ("24+48=72", "72"),
        ("She has 3 cats and 4 dogs.", "4"),
        ("1 + 1 = 2\n#### 72", "72"),
        ("#### 72\nIs 5 right?", "72"),
        ("#### $1,234", "1234"),
        ("####72.00", "72"),
        ("#### 1\n#### 2", "2"),
        ("#### The answer is 72 of 90", "72"),
        ("48/2 = 24\n####", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_number_a_text_arrives_at(text, number):
    expected = None if number is None else Decimal(number)
    assert final_number(text) == expected
    if number is not None:
        assert numeric_answer([text], [number]) == [1.0]
        assert numeric_answer([text], [str(expected + 1)]) == [0.0]
        assert numeric_answer([text], [str(expected * -1)]) == [float(expected == 0)]
    else:
        assert numeric_answer([text], ["72"]) == [0.0]


def test_references_may_be_numbers_formatted_texts_or_missing():
    completions = ["#### 1234"] * 6
    assert numeric_answer(completions, [1234, 1234.0, "1,234", "$1234.00", "work 5\n#### 1234", "none"]) == [
        1.0
    ] * 5 + [None]


def test_only_the_completion_is_read():
    kwargs = {"prompts": ["#### 72"], "answer": ["72"], "completion_ids": [[7]], "solution": ["#### 72"]}
    assert numeric_answer(completions=["who knows"], **kwargs) == [0.0]
    assert exact_match(completions=[""], **kwargs) == [0.0]


@pytest.mark.parametrize("fn", [exact_match, numeric_answer])
def test_lists_of_unequal_length_are_no_match(fn):
    with pytest.raises(ValueError, match="zip"):
        fn(["1", "2"], ["1"])


@pytest.mark.parametrize("fn", [exact_match, numeric_answer])
def test_a_row_without_an_answer_is_not_judged(fn):
    assert fn(["None", "7", "8"], [None, None, "8"]) == [None, None, 1.0]


@pytest.mark.parametrize("answer", ["1/2", "x = 3 or x = 2", r"\frac{1}{2}", "2^{10}", "2024-01-05", "7 or 8", "-"])
def test_a_reference_that_is_not_one_number_judges_nothing(answer):
    assert numeric_answer(["7/2", answer], [answer, f"work\n#### {answer}"]) == [None, None]


# mathematical expressions


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        ("1/2", "so it is $\\frac{2}{4}$", 1),
        ("1/2", "\\boxed{0.5}", 1),
        ("1/2", "$0.6$", 0),
        ("1/2", "I do not know", 0),
        ("1/2", "", 0),
        ("$x^2 + 2x + 1$", "it is $(x+1)^2$", 1),
        ("x^2 + 2x + 1", "it is $(x+1)^2$", 1),  # bare
        ("x^2 + 2x + 1", "it is $(x-1)^2$", 0),
        (r"\sqrt{8}", r"$2\sqrt{2}$", 1),
        (r"\{1, 2\}", r"$\{2, 1\}$", 1),
        ("72", "#### 72", 1),
        ("1,234", "$1234$", 1),
        ("Half of 48 is 48/2 = 24, and 48 + 24 = 72. #### 72", "72", 1),
        ("apples", "42", None),
        (72, "seventy-two, that is 72.", 1),
        ("no mathematics here", "42", None),
        (None, "42", None),
        ("None", "None", None),
    ],
)
def test_expressions(gold, completion, expected):
    assert math_expression(completions=[completion], answer=[gold]) == [expected]
    assert math_expression(completions=[chat(completion)], answer=[gold]) == [expected]


def test_expressions_are_judged_in_any_thread():
    found = []
    judge = lambda: found.append(math_expression(completions=["$1/2$", "$1/3$"], answer=["0.5", "0.5"]))  # noqa: E731
    thread = threading.Thread(target=judge)
    thread.start()
    thread.join(60)
    assert found == [[1.0, 0.0]]


def test_an_expression_that_takes_too_long_is_wrong_and_the_others_are_judged(monkeypatch):
    import math_verify

    verify = math_verify.verify

    def slow(gold, predicted, **keywords):
        if predicted[-1] == "9":
            time.sleep(30)
        return verify(gold, predicted, **keywords)

    monkeypatch.setattr("lit_rlhf.rewards.verifiers._SECONDS", 0.2)
    monkeypatch.setattr(math_verify, "verify", slow)
    rewards = RewardFunctions(math_expression)
    total, _ = rewards(["p"] * 3, ["$9$", "$5$", "$6$"], [[1]] * 3, {"answer": ["9", "5", "5"]})
    assert total.tolist() == [0, 1, 0]


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"math_expression needs the package math-verify: pip install 'lit_rlhf\[ma"):
        math_expression(completions=["1"], answer=["1"])


def test_messages_are_read_whole():
    blocks = [{"type": "text", "text": "4"}, {"type": "image"}, {"type": "text", "text": "2"}]
    assert text_of([{"role": "assistant", "content": blocks}]) == "42"
    assert text_of([{"content": "4"}, {"content": None}, {"content": "2"}]) == "42"
    assert exact_match(completions=[chat(" 42 ")], answer=[42]) == [1.0]
    assert numeric_answer(completions=[chat("#### 42.0")], answer=["42"]) == [1.0]


def test_what_votes_with_math_expression_is_the_expression_and_not_the_reasoning():
    pytest.importorskip("math_verify")
    said = ["Half of it, so $0.5$", r"First $3$, then $x = \frac{2}{4}$", "$3/5$", "I do not know"]
    found = [math_expression.answer(text) for text in said]
    assert found == ["1/2", "1/2", "3/5", None]

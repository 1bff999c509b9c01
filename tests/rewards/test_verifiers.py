"""What counts as the answer."""

from decimal import Decimal

import pytest

from lit_rlhf.rewards import exact_match, final_number, numeric_answer


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

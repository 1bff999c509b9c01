"""Rows in the Hub's conventions, and the sentence that each other one gets."""

import math

import numpy as np
import pytest

from lit_rlhf.data.columns import check_completions, conventional, of_one_kind
from lit_rlhf.errors import InputError
from tests.chat import assistant, user

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
ASK, ANSWER, WRONG = user("what is blue?"), assistant("the sky"), assistant("grass")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [*ASK, *ANSWER], "n": 1}, {"prompt": ASK, "completion": ANSWER, "n": 1}),
        ({"messages": [*ASK, *ANSWER, *ASK]}, {"prompt": [*ASK, *ANSWER, *ASK]}),
        (
            {"chosen": [*ASK, *ANSWER], "rejected": [*ASK, *WRONG]},
            {"prompt": ASK, "chosen": ANSWER, "rejected": WRONG},
        ),
        (  # as trl-lib/ultrafeedback_binarized has it
            {"prompt": "what is blue?", "chosen": [*ASK, *ANSWER], "rejected": [*ASK, *WRONG]},
            {"prompt": ASK, "chosen": ANSWER, "rejected": WRONG},
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},  # words stay whole
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
        ),
        ({"chosen": "It is", "rejected": "It is not"}, {"prompt": "It", "chosen": " is", "rejected": " is not"}),
        ({"chosen": "1+1=2", "rejected": "1+1=3"}, {"prompt": "1+1=", "chosen": "2", "rejected": "3"}),
        ({"prompt": "p", "chosen": "a b", "rejected": "a c"}, {"prompt": "p", "chosen": "a b", "rejected": "a c"}),
        ({"prompt": ASK, "completion": ANSWER}, {"prompt": ASK, "completion": ANSWER}),
        ({"prompt": "p", "completion": None}, {"prompt": "p", "completion": None}),
    ],
)
def test_every_convention_of_the_hub_is_read(row, expected):
    assert conventional(row, "row 1") == expected
    assert conventional(expected, "row 1") == expected


def test_columns_are_read_from_others():
    row = {"question": "1+1?", "target": "2", "prompt": "old", "n": 1}
    found = conventional(row, "row 1", {"prompt": "question", "answer": "target"})
    assert found == {"prompt": "1+1?", "answer": "2", "n": 1}
    sentence = (
        "row 1: data.columns reads 'prompt' from 'questoin', and the columns are 'n', 'prompt', 'question', 'target'"
    )
    with pytest.raises(InputError, match=sentence):
        conventional(row, "row 1", {"prompt": "questoin"})


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": []}, "'prompt' is empty"),
        ({"prompt": user(" ")}, "'prompt' is empty"),
        ({"messages": ANSWER}, "'prompt' is empty"),
        ({"prompt": ["hi"]}, "'prompt' is a list that holds a text; expected chat messages"),
        ({"prompt": [{"role": "user"}]}, "holds a message without 'content'; expected"),
        ({"prompt": [{"role": "user", "content": [{}]}]}, "holds a message whose 'content' is a list; expected"),
        ({"prompt": [{"role": "human", "content": "hi"}]}, "has the role 'human'; known: system, developer, user"),
        ({"prompt": [*ASK, *ANSWER]}, "the last message of 'prompt' has the role 'assistant'; expected the user's"),
        (
            {"prompt": ASK, "completion": ASK},
            "the first message of 'completion' has the role 'user'; expected 'assistant'",
        ),
        ({"prompt": ASK, "completion": []}, "'completion' has no messages; expected the assistant's"),
        (
            {"prompt": ASK, "completion": "the sky"},
            "'prompt' is a list and 'completion' is a text; expected two texts, or",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": ANSWER}, "'prompt' is a text and 'rejected' is a list"),
        ({"chosen": "yes", "rejected": "no"}, "have no common beginning, which would be their prompt"),
        ({"chosen": "yes, so", "rejected": "yes, so"}, "'chosen' and 'rejected' are the same"),
        ({"chosen": [*ASK, *ANSWER]}, "no column 'prompt' among 'chosen'; expected 'prompt'"),
        ({"chosen": ["a"], "rejected": ["b"]}, "no common beginning"),
        ({**PAIR, "margin": [1.0]}, "'margin' is a list; expected a finite number, or none"),
        ({**PAIR, "margin": "wide"}, "'margin' is a text; expected a finite number, or none"),
        ({**PAIR, "margin": True}, "'margin' is true or false; expected"),
        ({**PAIR, "margin": -math.inf}, "'margin' is -inf; expected"),
        ({**PAIR, "margin": 10**400}, "'margin' is 1000"),
        ({"prompt": b"p"}, "'prompt' is a value of the type bytes; expected a text or"),
        ({"prompt": 7.0}, "'prompt' is a number; expected a text or"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(row, sentence):
    with pytest.raises(InputError) as caught:
        conventional(row, "rows.jsonl, line 3")
    assert str(caught.value).startswith("rows.jsonl, line 3: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("margin", [None, 1, -0.5, 0, math.nan, np.float32(2)])
def test_a_margin_is_a_finite_number_or_none(margin):
    row = {**PAIR, "margin": margin}
    assert conventional(row, "row 1") == row
    assert conventional({"prompt": "p", "margin": "of the page"}, "row 1"), "which is no pair"


def test_columns_that_some_rows_lack_are_none_there():
    train, test = [{"prompt": "a", "answer": 1}, {"prompt": "b"}], [{"prompt": "c", "tests": "x"}]
    assert of_one_kind(train, test) == [
        [{"prompt": "a", "answer": 1, "tests": None}, {"prompt": "b", "answer": None, "tests": None}],
        [{"prompt": "c", "answer": None, "tests": "x"}],
    ]
    assert "tests" not in train[0], "the caller's rows stay as they are"


def test_texts_and_chat_messages_do_not_mix():
    with pytest.raises(InputError, match="the prompts of 1 of 3 rows are chat messages and the others texts"):
        of_one_kind([{"prompt": "a"}, {"prompt": ASK}], [{"prompt": "b"}])


@pytest.mark.parametrize("empty", ["", " \n", assistant(" ")])
def test_empty_completions_are_refused(empty):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": empty}]
    with pytest.raises(InputError, match="SFT: 'completion' is empty in 1 of 2 rows; leave them out"):
        check_completions(rows, ["completion"], "SFT")

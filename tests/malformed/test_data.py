"""Data files that cannot be trained on."""

import json
import pickle
from pathlib import Path

import pytest

from tests.malformed.answers import Payload, evaluated, trained

GOOD = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(20)]
SHOWN = [{**row, "completion": row["answer"]} for row in GOOD]
PAIRS = [{**row, "chosen": row["answer"], "rejected": "77"} for row in GOOD]
CHAT = [{"role": "user", "content": "1+1="}]

FILES = [  # the file's name and content: rows, a text or bytes
    ("empty.jsonl", "", "empty.jsonl is empty; expected a .jsonl file"),
    ("mark.jsonl", b"\xef\xbb\xbf", "mark.jsonl is empty; expected a .jsonl file"),
    ("missing.jsonl", None, "missing.jsonl does not exist; expected "),
    ("folder.jsonl", {}, "folder.jsonl cannot be read (Is a directory)"),
    ("./folder", {}, "data.path: cannot read './folder' (EmptyDatasetError: "),
    ("garbage.jsonl", bytes(range(256)), "garbage.jsonl is not a text file (byte 128 is not UTF-8)"),
    ("utf16.jsonl", '{"prompt": "a"}'.encode("utf-16"), "utf16.jsonl is not a text file (byte 0 is not UTF-8)"),
    ("zeros.jsonl", b"\0" * 1000, "zeros.jsonl, line 1: not valid JSON"),
    ("cut.jsonl", '{"prompt": "1+1="}\n{"prompt": "1+', "cut.jsonl, line 2: not valid JSON, unterminated string"),
    ("cut.json", json.dumps(GOOD)[:-20], "cut.json, line 1: not valid JSON"),
    ("list.jsonl", json.dumps(GOOD), "list.jsonl, line 1: found a list; expected an object with a 'prompt'"),
    ("object.json", json.dumps({"data": GOOD}), "object.json holds an object; expected a list of objects"),
    ("deep.jsonl", "[" * 100_000, "deep.jsonl, line 1: not valid JSON, maximum recursion depth exceeded"),
    ("digits.jsonl", '{"prompt": "1", "answer": ' + "1" * 5000 + "}", "digits.jsonl, line 1: not valid JSON, Exceeds"),
    ("twice.jsonl", '{"prompt": "1+1=", "prompt": "2+2="}', "twice.jsonl, line 1: not valid JSON, an object has the k"),
    ("half.jsonl", '{"prompt": "\\ud800"}', "half.jsonl, line 1: 'prompt' has '\\ud800' at 0, which is no character"),
    ("text.jsonl", [{"text": "x"}], "text.jsonl, line 1: no column 'prompt' among 'text'"),
    ("late.jsonl", [*GOOD, {"answer": "3"}], "late.jsonl, line 21: no column 'prompt' among 'answer'"),
    ("null.jsonl", [*GOOD, {"prompt": None}], "null.jsonl, line 21: 'prompt' is null"),
    ("number.jsonl", [*GOOD, {"prompt": 5}], "number.jsonl, line 21: 'prompt' is a number"),
    ("blank.jsonl", [*GOOD, {"prompt": " \n"}], "blank.jsonl, line 21: 'prompt' is empty"),
    ("mixed.jsonl", [*GOOD, {"prompt": CHAT}], "data: the prompts of 1 of 21 rows are chat messages and the others"),
    (
        "role.jsonl",
        [{"prompt": [{"role": "robot", "content": "a"}]}],
        "role.jsonl, line 1: a message of 'prompt' has",
    ),
    ("content.jsonl", [{"prompt": [{"role": "user"}]}], "content.jsonl, line 1: 'prompt' is a list that holds a messa"),
    ("strings.jsonl", [{"prompt": ["a"]}], "strings.jsonl, line 1: 'prompt' is a list that holds a text"),
    ("said.jsonl", [{"prompt": [*CHAT, {"role": "assistant", "content": "2"}]}], "said.jsonl, line 1: the last mess"),
    ("chat.jsonl", [{"prompt": CHAT, "answer": "2"}] * 20, "tokenizer '"),
    ("long.jsonl", [{"prompt": "1+" * 200, "answer": "3"}, *GOOD], "1 of 19 training prompts do not fit the model"),
    ("huge.jsonl", [{"prompt": "1" * 200_000, "answer": "3"}, *GOOD], "1 of 19 training prompts do not fit the model"),
    ("gsm8k.jsonl", [{"question": "a", "answer": "72"}], "gsm8k.jsonl, line 1: no column 'prompt' among 'answer', 'q"),
    ("unjudged.jsonl", [{"prompt": "1+1="}] * 20, "no reward function: give reward_funcs=[...]"),
    ("table.csv", "prompt,answer\n1,2\n", "table.csv cannot be read; expected a .jsonl, .json or .parquet file"),
    ("rows.pkl", pickle.dumps([Payload()]), "rows.pkl cannot be read; expected a .jsonl, .json or .parquet file"),
    ("cut.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "data.path: cannot read 'cut.parquet' (ArrowInvalid: "),
    ("empty.parquet", b"", "data.path: cannot read 'empty.parquet' (ArrowInvalid: "),
    ("a/b/c", None, "a/b/c does not exist; expected a .jsonl, .json or .parquet file"),
    ("~nobody-of-that-name/a.jsonl", None, "data.path=~nobody-of-that-name/a.jsonl: there is no user of that name"),
]
TRAINED_ON = [  # by what learns from completions
    ("sft", GOOD, "SFT needs a text 'completion' in every row; 18 of 18 have not"),
    ("sft", [*SHOWN, {**SHOWN[0], "completion": 5}], "rows.jsonl, line 21: 'completion' is a number"),
    ("sft", [{**SHOWN[0], "completion": ""}, *SHOWN], "SFT: 'completion' is empty in 1 of 19 rows"),
    ("sft", [*SHOWN, {**SHOWN[0], "completion": ""}], "held-out rows: 'completion' is empty in 1 of 2 rows"),
    ("sft", [*SHOWN, {**SHOWN[0], "completion": CHAT}], "rows.jsonl, line 21: 'prompt' is a text and 'completion' is"),
    ("sft", [{**SHOWN[0], "completion": "1" * 300}, *SHOWN], "1 of 19 training rows with completion and EOS do not f"),
    ("dpo", SHOWN, "DPO needs a text 'chosen' and a text 'rejected' in every row; 18 of 18 have not"),
    ("dpo", [{**row, "rejected": row["chosen"]} for row in PAIRS], "DPO: 'chosen' and 'rejected' are the same in all"),
    ("dpo", [{**PAIRS[0], "rejected": None}, *PAIRS], "DPO needs a text 'chosen' and a text 'rejected' in every row"),
    ("dpo", [{"chosen": "2", "rejected": "3"}], "rows.jsonl, line 1: 'chosen' and 'rejected' have no common beginning"),
    ("reward_modeling", [{**PAIRS[0], "margin": "big"}, *PAIRS], "rows.jsonl, line 1: 'margin' is a text; expected"),
    ("reward_modeling", [{**PAIRS[0], "margin": 1e999}, *PAIRS], "rows.jsonl, line 1: 'margin' is inf; expected"),
]
ARGUMENTS = [  # beside a file with which nothing is wrong
    ("data.columns={prompt: question}", "good.jsonl, line 1: data.columns reads 'prompt' from 'question'"),
    ("data.columns=abc", "'data.columns' must be Mapping[str, str], got 'abc'"),
    ("data.split=nope", "data.split: good.jsonl has no split 'nope'; it has 'train'"),
    ("data.validation_path=nope.jsonl", "nope.jsonl does not exist; did you mean 'good.jsonl'?"),
    ("data.held_out=20", "data.held_out=20 leaves nothing to train on: good.jsonl has 20 rows"),
    ("data.held_out=-1", "data.held_out must be at least 0, got -1"),
    ("data.validation_batch_size=0", "data.validation_batch_size must be at least 1, got 0"),
    ("data.prompt_template=abc", "data.prompt_template='abc' has no {prompt}, where the prompt is put"),
    ("data.long_rows=foo", "data.long_rows must be one of stop, drop, truncate, got 'foo'"),
    ("data.token_cache=good.jsonl", "data.token_cache: good.jsonl/"),
]
BUILT_IN = [
    ("data.difficulty=0", "arithmetic: difficulty must be 1 to 9 digits, got 0"),
    ("data.difficulty=[1,1]", "arithmetic: difficulty must be levels that differ"),
    ("data.train_size=0", "data: there are no rows to train on; lower data.held_out, or give more rows"),
    ("data.train_size=99999999999", "arithmetic: train_size must be at most 9984"),
    ("data=file", "'data.path' is missing; give data.path=..."),
]


def write(name, content):
    if isinstance(content, dict):
        Path(name).mkdir()
    elif isinstance(content, list):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in content))
    elif content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(("name", "content", "sentence"), FILES)
def test_files(name, content, sentence):
    write(name, content)
    assert trained(f"data.path={name}", "data.held_out=2").startswith(sentence)


@pytest.mark.parametrize(("algorithm", "rows", "sentence"), TRAINED_ON)
def test_rows_that_nothing_can_be_learnt_from(algorithm, rows, sentence):
    write("rows.jsonl", rows)
    given = [f"algo={algorithm}", "algo.batch_size=4", "data.path=rows.jsonl", "data.held_out=2"]
    assert trained(*given).startswith(sentence)


@pytest.mark.parametrize(("argument", "sentence"), ARGUMENTS)
def test_arguments(argument, sentence):
    write("good.jsonl", GOOD)
    assert trained("data.path=good.jsonl", argument).startswith(sentence)


@pytest.mark.parametrize(("argument", "sentence"), BUILT_IN)
def test_the_built_in_task(argument, sentence):
    assert trained(argument).startswith(sentence)


def test_what_is_evaluated_on():
    write("long.jsonl", [{"prompt": "1+" * 200, "answer": "3"}] * 20)
    assert evaluated("data.path=long.jsonl").startswith("2 of 2 held-out prompts do not fit the model")


def test_a_loading_script_is_not_run():
    write("./folder", {})
    write("folder/folder.py", "open('ran', 'w')")
    write("folder/rows.pkl", pickle.dumps([Payload()]))
    assert trained("data.path=./folder").startswith("data.path: cannot read './folder' (")

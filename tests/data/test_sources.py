"""Reading dataset files, and the sentence each broken one gets."""

import json
import re
from pathlib import Path

import pytest

from lit_rlhf.data import read_rows
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import numeric_answer

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"
ROW = '{"prompt": "1+1=", "answer": "2"}\n'


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.jsonl"):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def refusal(path):
    with pytest.raises(InputError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "a\u2028b\u0085é", "answer": 3}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)),
        ("data.jsonl", "\ufeff\r\n" + "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\r\n"),
        ("DATA.JSONL", "\n".join(map(json.dumps, ROWS)) + "\n"),
        ("data.json", json.dumps(ROWS, indent=2)),
    ],
)
def test_reads_json_lines_and_json_lists(write, name, content):
    file = write(content, name)
    assert read_rows(file) == read_rows(str(file)) == ROWS


def test_reads_gsm8k_format(write):
    raw = [
        {"question": "How many?", "answer": "20 + 52 = <<20+52=72>>72.\n#### 72"},
        {"question": "How much?", "answer": "#### is a mark.\n#### -1,234 "},
    ]
    first, second = read_rows(write("\n".join(map(json.dumps, raw))))
    assert first == {
        "question": "How many?",
        "prompt": "How many?",
        "answer": "72",
        "solution": "20 + 52 = <<20+52=72>>72.\n#### 72",
    }
    assert second["answer"] == "-1234"


def test_a_prompt_column_wins_over_gsm8k(write):
    row = {"prompt": "p", "question": "q", "answer": "#### 1"}
    assert read_rows(write(json.dumps(row))) == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected a .jsonl file"),
        (" \n\n", "is empty; expected a .jsonl file"),
        (ROW + "\n{oops}\n", "line 3: not valid JSON, expecting property name enclosed in double quotes at column 2"),
        (ROW + ROW.strip() + ROW, "line 2: not valid JSON, extra data"),
        ("1" * 5000, "line 1: not valid JSON"),
        ("[" * 200_000, "line 1: not valid JSON"),
        (ROW + '"text"', "line 2: found a text; expected an object with a 'prompt'"),
        ("[1]", "line 1: found a list; expected an object"),
        ("3", "line 1: found a number; expected an object"),
        ("null", "line 1: found null; expected an object"),
        (
            '{"text": "a", "label": 1}',
            "line 1: no column 'prompt' among 'label', 'text'; expected 'prompt', 'messages', 'chosen' and",
        ),
        ('{"question": "a", "answer": "72"}', "line 1: no column 'prompt' among 'answer', 'question'"),
        ("{}", "line 1: no column 'prompt' among none"),
        (ROW + '{"prompt": " ", "answer": "2"}', "line 2: 'prompt' is empty"),
        ('{"prompt": 7}', "line 1: 'prompt' is a number; expected a text or a list of chat messages"),
        ('{"prompt": null}', "line 1: 'prompt' is null; expected a text or a list of chat messages"),
        (
            '{"question": 7, "answer": "#### 7"}',
            "line 1: 'prompt' is a number; expected a text or a list of chat messages",
        ),
        (b"\x1f\x8b\x08\x00\xff\xfe", "is not a text file (byte 1 is not UTF-8)"),
    ],
)
def test_broken_json_lines_are_refused(write, content, message):
    assert message in refusal(write(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a"},\n {"prompt": }]', "line 2: not valid JSON, expecting value at column 13"),
        ('{"prompt": "a"}', "holds an object; expected a list of objects, or the suffix .jsonl"),
        ('[{"prompt": "a"}, 3]', "row 2: found a number"),
        ("[]", "has no rows"),
    ],
)
def test_broken_json_lists_are_refused(write, content, message):
    assert message in refusal(write(content, "data.json"))


def test_a_missing_file_names_its_nearest_sibling(write, tmp_path):
    assert "does not exist; expected a .jsonl, .json or .parquet file" in refusal(tmp_path / "train.jsonl")
    assert "does not exist; expected" in refusal(tmp_path / "nowhere" / "train.jsonl")
    for name in ("training.jsonl", "test.jsonl", "train.txt"):
        write(ROW, name)
    assert refusal(tmp_path / "train.jsonl").endswith("does not exist; the nearest file beside it is training.jsonl")


def test_an_unreadable_file_is_refused(write, monkeypatch):
    file = write(ROW)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    assert "cannot be read (Permission denied)" in refusal(file)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the repository")
def test_gsm8k_itself():
    rows = [row for name in ("train", "test") for row in read_rows(GSM8K / f"{name}.jsonl")]
    assert len(rows) == 8792
    solutions, answers = [r["solution"] for r in rows], [r["answer"] for r in rows]
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", a) for a in answers)
    assert numeric_answer(solutions, answers) == [1.0] * len(rows)
    assert numeric_answer([s.replace("####", "The answer is $") + "." for s in solutions], answers) == [1.0] * len(rows)
    shifted = answers[1:] + answers[:1]
    same = [float(float(a) == float(b)) for a, b in zip(answers, shifted, strict=True)]
    assert 0 < sum(same) < 0.1 * len(same)
    assert numeric_answer(solutions, shifted) == same

"""Reading dataset files, and the sentence each broken one gets."""

import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from lit_rlhf.data import FileData, read_rows
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import numeric_answer
from tests.helpers import SHARED

GSM8K = SHARED / "data" / "gsm8k"
ROW = '{"prompt": "1+1=", "answer": "2"}\n'


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


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
        "completion": "20 + 52 = <<20+52=72>>72.\n#### 72",
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
    assert refusal(tmp_path / "train.jsonl").endswith("does not exist; did you mean 'training.jsonl'?")


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
    solutions, answers = [r["completion"] for r in rows], [r["answer"] for r in rows]
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", a) for a in answers)
    assert numeric_answer(solutions, answers) == [1.0] * len(rows)
    assert numeric_answer([s.replace("####", "The answer is $") + "." for s in solutions], answers) == [1.0] * len(rows)
    shifted = answers[1:] + answers[:1]
    same = [float(float(a) == float(b)) for a, b in zip(answers, shifted, strict=True)]
    assert 0 < sum(same) < 0.1 * len(same)
    assert numeric_answer(solutions, shifted) == same


TRAIN = [{"prompt": f"{i}+1=", "answer": str(i + 1), "tags": ["a", str(i)]} for i in range(20)]
TEST = [{"prompt": f"{i}+2=", "answer": str(i + 2), "tags": []} for i in range(3)]


def write_lines(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def sources(tmp_path):
    """The same two splits in every form that `datasets` reads without the Hub."""
    plain, saved = tmp_path / "plain", tmp_path / "saved"
    plain.mkdir()
    write_lines(plain / "train.jsonl", TRAIN)
    write_lines(plain / "test.jsonl", TEST)
    parts = {"train": Dataset.from_list(TRAIN), "test": Dataset.from_list(TEST)}
    DatasetDict(parts).save_to_disk(saved)
    parts["train"].save_to_disk(tmp_path / "single")
    parts["train"].to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "parquet").mkdir()
    for name, part in parts.items():
        part.to_parquet(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["plain", "saved", "parquet"])
def test_a_folder_is_read_with_its_own_validation_split(sources, name):
    assert read_rows(sources / name) == TRAIN
    assert read_rows(sources / name, split="test") == TEST
    data = FileData(sources / name)
    assert (data.train_rows, data.held_out_rows) == (TRAIN, TEST)
    assert type(data.train_rows[0]["tags"]) is list
    assert data.reward_funcs == [numeric_answer]
    assert FileData(sources / name, held_out=2).held_out_rows == TEST[:2]
    assert FileData(sources / name, split="test", validation_split="train").held_out_rows == TRAIN


@pytest.mark.parametrize("name", ["rows.parquet", "single"])
def test_what_has_one_split_is_held_out_from(sources, name):
    data = FileData(sources / name, held_out=4)
    assert data.train_rows + data.held_out_rows == TRAIN
    assert data.held_out_rows == TRAIN[-4:]


def test_splits_and_configurations_that_are_not_there_are_named(sources):
    for arguments, sentence in (
        ({"split": "dev"}, "data.split: .*plain has no split 'dev'; it has 'train', 'test'"),
        ({"validation_split": "dev"}, "data.validation_split: .*plain has no split 'dev'; it has 'train', 'test'"),
        ({"name": "main"}, "data.path: cannot read .*main"),
    ):
        with pytest.raises(InputError, match=sentence):
            FileData(sources / "plain", **arguments)
    with pytest.raises(
        InputError, match=r"data.name=main chooses among the configurations of a dataset, and .* is a file"
    ):
        FileData(sources / "rows.parquet", name="main")


def test_a_validation_source_of_its_own_has_its_own_split_and_configuration(sources, monkeypatch):
    held_out = FileData(sources / "rows.parquet", validation_path=sources / "plain").held_out_rows
    assert held_out == TEST, "of train and test"
    (sources / "plain" / "train.jsonl").unlink()
    assert FileData(sources / "rows.parquet", validation_path=sources / "plain").held_out_rows == TEST
    assert FileData(sources / "saved", validation_path=sources / "single").held_out_rows == TRAIN, "which is all it has"
    file = sources / "plain" / "test.jsonl"
    (sources / "empty").mkdir()
    for path, sentence in (
        (file, "^data.validation_split: .*test.jsonl has no split 'test'; it has 'train'$"),
        (sources / "plain", "^data.validation_split: .*plain has no split 'dev'; it has 'test'$"),
        (sources / "empty", "^data.validation_path: cannot read"),
    ):
        with pytest.raises(InputError, match=sentence):
            FileData(sources / "saved", validation_path=path, validation_split="test" if path == file else "dev")
    asked = []
    monkeypatch.setattr("lit_rlhf.data.sources.offline_unless_reached", nullcontext)
    monkeypatch.setattr("datasets.load_dataset", lambda path, name: asked.append((path, name)) or {"test": Rows(TEST)})
    FileData(sources / "parquet", name="main", split="test", validation_path="org/name")
    FileData(sources / "parquet", name="main", split="test", validation_path=file)
    assert asked == [(str(sources / "parquet"), "main"), ("org/name", "main"), (str(sources / "parquet"), "main")]


class Rows:
    """What stands for a dataset."""

    def __init__(self, rows):
        self.to_list = rows.copy


def test_the_place_of_a_row_of_a_folder_is_named(sources):
    write_lines(sources / "plain" / "test.jsonl", [*TEST, {**TEST[0], "prompt": ""}])
    with pytest.raises(InputError, match=r"plain, split test, row 4: 'prompt' is empty"):
        FileData(sources / "plain")


def test_what_datasets_cannot_read_is_one_sentence(write, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", write(b"PAR1", "data.parquet")):
        message = refusal(path)
        assert "data.path: cannot read" in message
        assert (
            "expected a .jsonl, .json or .parquet file, a folder of them, or a dataset of the Hub (org/name)" in message
        )


def test_paths_that_are_no_source_are_refused(write, tmp_path):
    assert "data.csv cannot be read; expected a .jsonl, .json or" in refusal(write(ROW, "data.csv"))
    assert "nowhere does not exist; expected a .jsonl" in refusal(tmp_path / "nowhere")
    assert "a/b/c does not exist; expected a .jsonl" in refusal("a/b/c")


def test_a_hub_name_without_a_network_is_one_sentence(monkeypatch):
    """One question to the Hub decides; `datasets` itself would ask for half a minute."""
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    message = refusal("nobody/nothing-at-all")
    assert "data.path: cannot read 'nobody/nothing-at-all' (ConnectionError: Couldn't reach" in message
    assert asked == [10]
    assert not constants.HF_HUB_OFFLINE, "only for this dataset"


def test_without_the_library_the_extra_is_named(monkeypatch, write, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(tmp_path).endswith("needs the package datasets: pip install 'lit_rlhf[data]'")
    assert read_rows(write(ROW)), "a JSON file needs none"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the repository")
def test_the_folder_of_gsm8k_is_read_as_it_comes():
    data = FileData(GSM8K)
    assert (len(data.train_rows), len(data.held_out_rows)) == (7473, 1319)
    assert data.reward_funcs == [numeric_answer]
    assert data.train_rows == read_rows(GSM8K / "train.jsonl")

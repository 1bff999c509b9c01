"""Every text is encoded once in a run, or once for all runs; what is too long is cut where it should be."""

import pytest
import torch

from lit_rlhf.data import encoding
from lit_rlhf.data.encoding import Encoder
from lit_rlhf.errors import InputError
from lit_rlhf.text import encode_completion, encode_prompt
from tests.chat import CHATML, LLAMA, assistant, byte_tokenizer, user
from tests.helpers import NumberTokenizer

ROWS = [{"prompt": f"{i} and", "completion": f"{i} then", "chosen": "yes", "rejected": "no"} for i in range(6)]
CHAT = [{"prompt": user(f"{i} and"), "completion": assistant(f"{i} then")} for i in range(6)]
PAIR = ("chosen", "rejected")


@pytest.fixture
def counted(monkeypatch):
    """How many prompts and completions were encoded."""
    counts = {"prompts": 0, "completions": 0}

    def counting(name, fn):
        def wrapped(tokenizer, texts, *rest):
            counts[name] += len(texts)
            return fn(tokenizer, texts, *rest)

        return wrapped

    for name in counts:
        monkeypatch.setattr(encoding, f"encode_{name}", counting(name, getattr(encoding, f"encode_{name}")))
    return counts


def encoder_of(tokenizer=None, template=None):
    tokenizer = tokenizer or byte_tokenizer(template, bos=template == LLAMA)
    return Encoder(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize(("rows", "template"), [(ROWS, None), (CHAT, CHATML), (CHAT, LLAMA)])
def test_ids_are_those_of_the_texts_whether_they_were_prepared_or_not(rows, template):
    fresh, prepared = encoder_of(template=template), encoder_of(template=template)
    prepared.prepare(rows, ["completion"])
    for row in rows:
        expected = [
            encode_prompt(fresh.tokenizer, row["prompt"]),
            encode_completion(fresh.tokenizer, row["completion"], prompt=row["prompt"]),
        ]
        assert prepared.row(row, ["completion"]) == fresh.row(row, ["completion"]) == expected
        assert prepared.prompt(row["prompt"]) == expected[0]
        assert prepared.length(row, ["completion"]) == sum(map(len, expected))


@pytest.mark.parametrize(("rows", "template"), [(ROWS, None), (CHAT, CHATML)])
def test_every_text_is_encoded_once(counted, rows, template):
    encoder = encoder_of(template=template)
    for _ in range(3):
        encoder.prepare(rows, ["completion"])
        for row in rows:
            encoder.row(row, ["completion"])
    assert counted == {"prompts": 6, "completions": 6}


def test_rows_that_change_cost_what_changes_and_take_the_memory_of_one_pass(counted):
    encoder = encoder_of()
    encoder.prepare([{"prompt": "held out"}], place="held-out")
    for i in range(10):
        encoder.prepare([{**row, "completion": f"{row['completion']} {i}"} for row in ROWS], ["completion"])
    assert counted == {"prompts": 7, "completions": 60}
    assert {place: [len(ids) for ids in known] for place, known in encoder._known.items()} == {
        "": [6, 6],
        "held-out": [1, 0],
    }
    encoder.prompt("held out")
    assert counted["prompts"] == 7


def test_a_prompt_and_a_completion_of_one_text_keep_their_own_ids():
    encoder = encoder_of(byte_tokenizer(bos=True))
    encoder.prepare([{"prompt": "same", "completion": "same"}], ["completion"])
    prompt, completion = encoder.row({"prompt": "same", "completion": "same"}, ["completion"])
    plain = encoder.tokenizer.encode("same", add_special_tokens=False)
    assert (prompt, completion) == ([1, *plain], [*plain, 2])


def test_one_answer_to_two_chat_prompts_is_rendered_for_each():
    """The template that counts its turns writes another completion after another prompt."""
    template = "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[{{ messages | length + 1 }}]{% endif %}"
    encoder = encoder_of(template=template)
    short, long = user("hi"), [*user("hi"), *assistant("ho"), *user("and?")]
    rows = [
        {"prompt": prompt, "completion": [*assistant("ha"), *user("x"), *assistant("y")]} for prompt in (short, long)
    ]
    encoder.prepare(rows, ["completion"])
    decoded = [encoder.tokenizer.decode(encoder.row(row, ["completion"])[1]) for row in rows]
    assert decoded == ["ha[3]x[4]y</s>", "ha[5]x[6]y</s>"]


class Numbers(NumberTokenizer):
    """With BOS 60, where a text begins with it."""

    bos_token_id = 60


@pytest.mark.parametrize(
    ("row", "limit", "expected"),
    [
        ({"prompt": "2 3 4", "completion": "5 6"}, 6, [[2, 3, 4], [5, 6, 1]]),  # fits, EOS 1 included
        ({"prompt": "2 3 4 5 6", "completion": "7"}, 6, [[3, 4, 5, 6], [7, 1]]),  # the prompt's beginning goes
        ({"prompt": "60 2 3 4 5 6", "completion": "7"}, 6, [[60, 4, 5, 6], [7, 1]]),  # but BOS stays
        ({"prompt": "2 3", "completion": "4 5 6 7 8 9"}, 6, [[2, 3], [4, 5, 6, 7]]),  # the completion's end, with EOS
        ({"prompt": "2 3 4 5 6", "completion": "7 8 9 10 11"}, 6, [[4, 5, 6], [7, 8, 9]]),  # half each
        ({"prompt": "2 3 4 5 6", "completion": "7 8"}, 7, [[3, 4, 5, 6], [7, 8, 1]]),
    ],
)
def test_what_is_too_long_is_cut(row, limit, expected):
    encoder = Encoder(Numbers(), [1])
    encoder.truncate = True
    assert encoder.row(row, ["completion"], limit) == expected
    encoder.truncate = False
    if encoder.length(row, ["completion"]) > limit:
        with pytest.raises(InputError, match=f"does not fit the model, which has room for {limit}; shorten it, or"):
            encoder.row(row, ["completion"], limit)


def test_both_completions_of_a_pair_follow_one_prompt():
    encoder = Encoder(Numbers(), [1])
    encoder.truncate = True
    row = {"prompt": "2 3 4 5 6", "chosen": "7", "rejected": "8 9 10 11 12"}
    assert encoder.row(row, PAIR, 6) == [[4, 5, 6], [7, 1], [8, 9, 10]]
    assert encoder.prompt("60 2 3 4", 3) == [60, 3, 4]
    with pytest.raises(InputError, match="room for 0"):
        encoder.prompt("2 3", -1)


def test_token_ids_are_found_on_disk_by_the_next_run(counted, tmp_path):
    for _ in range(2):
        encoder = encoder_of()
        encoder.prepare(ROWS, PAIR, folder=tmp_path)
        assert [encoder.row(row, PAIR) for row in ROWS] == [encoder_of().row(row, PAIR) for row in ROWS]
    assert counted == {"prompts": 6 + 2 * 6, "completions": 2 + 2 * 12}, "once, and by the comparisons"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("other", ["texts", "tokenizer", "template", "eos"])
def test_what_was_encoded_otherwise_is_not_found(counted, tmp_path, other):
    encoder_of(template=CHATML).prepare(CHAT, ["completion"], folder=tmp_path)
    rows, tokenizer = CHAT, byte_tokenizer(CHATML)
    if other == "texts":
        rows = [*CHAT[1:], {**CHAT[0], "prompt": user("new")}]
    elif other == "tokenizer":
        tokenizer.add_tokens(["then"])
    elif other == "template":
        tokenizer.chat_template = CHATML.replace("<|im_start|>", "<|im_start|> ")
    ends = [tokenizer.eos_token_id, 4] if other == "eos" else [tokenizer.eos_token_id]
    encoder = Encoder(tokenizer, ends)
    encoder.prepare(rows, ["completion"], folder=tmp_path)
    assert counted["completions"] == 12
    assert encoder.row(rows[0], ["completion"]) == Encoder(tokenizer, ends).row(rows[0], ["completion"])


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_damaged_files_are_as_good_as_none(counted, tmp_path, damage):
    encoder_of().prepare(ROWS, ["completion"], folder=tmp_path)
    for file in tmp_path.iterdir():
        if damage == "flipped":
            saved = torch.load(file)
            saved["ids"][3] ^= 1
            torch.save(saved, file)
        else:
            file.write_bytes({"empty": b"", "cut": file.read_bytes()[:-30], "other": b"{}"}[damage])
    encoder = encoder_of()
    encoder.prepare(ROWS, ["completion"], folder=tmp_path)
    assert counted["prompts"] == 12
    assert encoder.row(ROWS[3], ["completion"]) == encoder_of().row(ROWS[3], ["completion"])
    before = dict(counted)
    encoder_of().prepare(ROWS, ["completion"], folder=tmp_path)
    assert counted == before, "written anew, and found"


def test_a_folder_that_cannot_be_written_and_a_slow_tokenizer_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data.token_cache: .* cannot be written"):
        encoder_of().prepare(ROWS, folder=tmp_path / "file")
    with pytest.raises(InputError, match=r"data\.token_cache needs a fast tokenizer"):
        Encoder(NumberTokenizer(), [1]).prepare([{"prompt": "5"}], folder=tmp_path)

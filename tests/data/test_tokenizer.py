"""The character tokenizer restores every text, alone and after a round through a folder."""

import itertools

import pytest
from transformers import AutoTokenizer

from lit_rlhf.data.tasks import character_tokenizer
from lit_rlhf.data.tasks.tokenizer import CHARACTERS


@pytest.fixture(scope="module", params=["built", "loaded"])
def tokenizer(request, tmp_path_factory):
    tokenizer = character_tokenizer()
    if request.param == "built":
        return tokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_its_vocabulary(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 21
    special = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
    assert special == ("<pad>", "<eos>", "<unk>", None)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    "text",
    [
        "12+34=46",
        "(1+2) * 3 = 9\n",
        "  7",
        "7  ",
        "\n\n",
        " - 1",
        "",
        *("".join(p) for p in itertools.pairwise(CHARACTERS)),
    ],
)
def test_decode_restores_what_encode_was_given(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.batch_decode([ids, ids]) == [text, text]


def test_every_character_has_a_token_of_its_own(tokenizer):
    ids = tokenizer.encode(CHARACTERS)
    assert len(set(ids)) == len(CHARACTERS) == 18
    assert not set(ids) & {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}


def test_other_characters_are_unknown_one_by_one(tokenizer):
    ids = tokenizer.encode("1aé2")
    assert ids[1:3] == [tokenizer.unk_token_id] * 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12"


def test_it_pads_on_the_left_and_skips_special_tokens(tokenizer):
    batch = tokenizer(["1+1=", "12+34="], padding=True)
    assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1, 1], [1] * 6]
    answer = [*tokenizer.encode("46"), tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "46"
    assert tokenizer.encode("46<eos>") == answer[:3]

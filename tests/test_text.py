"""Prompt and completion ids: BOS once, EOS once, whatever the tokenizer's template does."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_rlhf.data.tasks import character_tokenizer
from lit_rlhf.errors import InputError
from lit_rlhf.text import encode_completion, encode_prompt

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260k"
BOS, EOS, SOP, A, B = 0, 1, 2, 3, 4


def word_tokenizer(template, **special):
    """A tokenizer of the words "a" and "b" that wraps a text by `template`."""
    backend = Tokenizer(models.WordLevel({"<s>": BOS, "</s>": EOS, "<sop>": SOP, "a": A, "b": B}, unk_token="b"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>", "<sop>"])
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS), ("<sop>", SOP)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>"} | special)


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("$A", "a b", [A, B]),
        ("<s> $A", "a b", [BOS, A, B]),
        ("<s> $A </s>", "a b", [BOS, A, B]),
        ("$A </s>", "a b", [A, B]),
        ("<s> $A", "<s> a", [BOS, A]),  # a chat template has written BOS already
        ("<s> $A </s>", "<s> a", [BOS, A]),
        ("$A", "<s> a", [BOS, A]),
        ("<s> $A", "<s> <s> a", [BOS, A]),
        ("<s> <sop> $A", "a", [BOS, SOP, A]),
        ("<s> $A", "a </s> b", [BOS, A, EOS, B]),  # turns of a conversation stay as they are
    ],
)
def test_a_prompt_has_bos_once_and_no_eos(template, text, expected):
    assert encode_prompt(word_tokenizer(template), text) == expected


def test_a_prompt_of_a_tokenizer_without_bos():
    tokenizer = word_tokenizer("$A </s>", bos_token=None)
    assert encode_prompt(tokenizer, "a a") == [A, A]


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b", [A, B, EOS]), ("a </s>", [A, EOS]), ("a </s> </s>", [A, EOS]), ("", [EOS]), ("</s> a", [EOS, A, EOS])],
)
def test_a_completion_has_no_bos_and_eos_once(template, text, expected):
    tokenizer = word_tokenizer(template)
    assert encode_completion(tokenizer, text) == expected
    assert encode_completion(tokenizer, text, EOS) == expected


def test_another_eos_may_be_given():
    assert encode_completion(word_tokenizer("<s> $A"), "a", SOP) == [A, SOP]
    assert encode_completion(word_tokenizer("<s> $A"), "a", BOS) == [A, BOS]  # 0 is an id like any other


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = word_tokenizer("<s> $A", eos_token=None)
    with pytest.raises(InputError, match=r"tokenizer .* has no EOS token, so that no completion can end"):
        encode_completion(tokenizer, "a")
    assert encode_completion(tokenizer, "a", EOS) == [A, EOS]


def test_the_character_tokenizer():
    tokenizer = character_tokenizer()
    ids = encode_prompt(tokenizer, "12+34=") + encode_completion(tokenizer, "46")
    assert tokenizer.decode(ids) == "12+34=46<eos>"
    assert len(ids) == 9


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k model is not beside the repository")
def test_a_sentencepiece_tokenizer_that_adds_bos():
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = encode_prompt(tokenizer, "Once upon a time")
    assert prompt.count(bos) == 1
    assert prompt[0] == bos
    assert eos not in prompt
    assert encode_prompt(tokenizer, "<s>Once upon a time").count(bos) == 1
    completion = encode_completion(tokenizer, "there was a cat")
    assert bos not in completion
    assert completion.count(eos) == 1
    assert completion[-1] == eos
    assert tokenizer.decode(prompt + completion, skip_special_tokens=True) == "Once upon a time there was a cat"

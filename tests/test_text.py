"""Prompt and completion ids: BOS once, EOS once, whatever the tokenizer's template does."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_rlhf.data.tasks import character_tokenizer
from lit_rlhf.errors import InputError
from lit_rlhf.text import encode_completion, encode_completions, encode_prompt, encode_prompts, token_ids
from tests.chat import CHATML, LLAMA, REWRITES, SPECIAL, assistant, byte_tokenizer, user
from tests.helpers import SHARED

STORIES = SHARED / "models" / "stories260k"
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


ASK, ANSWER = user("what is blue?"), assistant("the sky")


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "whole"),
    [
        (
            byte_tokenizer(CHATML, eos="<|im_end|>"),
            "<|im_start|>user\nwhat is blue?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\nwhat is blue?<|im_end|>\n<|im_start|>assistant\nthe sky<|im_end|>",
        ),
        (
            byte_tokenizer(LLAMA, bos=True),
            "<s>[INST] what is blue? [/INST]",
            "<s>[INST] what is blue? [/INST] the sky</s>",
        ),
        (
            byte_tokenizer(CHATML, eos="<|endoftext|>"),  # the template's end of turn is not EOS, so one more follows
            "<|im_start|>user\nwhat is blue?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\nwhat is blue?<|im_end|>\n<|im_start|>assistant\nthe sky<|im_end|>\n<|endoftext|>",
        ),
    ],
    ids=["chatml", "llama", "other eos"],
)
def test_chat_messages_are_what_the_template_writes(tokenizer, prompt, whole):
    start, end = encode_prompt(tokenizer, ASK), encode_completion(tokenizer, ANSWER, prompt=ASK)
    assert tokenizer.decode(start) == prompt
    assert tokenizer.decode(start + end) == whole
    assert start == tokenizer.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"], "as sampling reads it"
    assert sum(i == tokenizer.eos_token_id for i in end) == 1
    assert (start + end).count(SPECIAL.index("<s>")) == prompt.count("<s>")


def test_any_of_several_eos_may_end_a_chat_completion_and_the_first_ends_a_text():
    tokenizer = byte_tokenizer(CHATML, eos="<|endoftext|>")
    im_end, eos = SPECIAL.index("<|im_end|>"), tokenizer.eos_token_id
    ends = [eos, im_end]
    assert encode_completion(tokenizer, ANSWER, ends, ASK) == [*tokenizer.encode("the sky"), im_end]
    assert encode_completion(tokenizer, "the sky", ends) == [*tokenizer.encode("the sky"), eos]
    assert encode_completion(tokenizer, "the sky<|im_end|><|endoftext|>", ends) == [
        *tokenizer.encode("the sky"),
        im_end,
    ]
    assert encode_completion(tokenizer, "a<|im_end|>b", ends) == [*tokenizer.encode("a<|im_end|>b"), eos]


def test_earlier_turns_keep_their_ends():
    tokenizer = byte_tokenizer(LLAMA, bos=True)
    ids = encode_prompt(tokenizer, [*ASK, *ANSWER, *user("and green?")])
    assert tokenizer.decode(ids) == "<s>[INST] what is blue? [/INST] the sky</s>[INST] and green? [/INST]"


@pytest.mark.parametrize(
    ("template", "prompt", "sentence"),
    [
        (None, ASK, "has no chat template, and the data has chat messages; give tokenizer=... of a chat model"),
        (
            LLAMA,
            [{"role": "system", "content": "be kind"}, *ASK],
            "refuses messages of the roles system, user.*: Only user",
        ),
        (REWRITES, ASK, "does not begin with its prompt: '2what is blue.*' where the prompt has '1what is blue"),
    ],
    ids=["none", "refuses", "rewrites"],
)
def test_templates_that_do_not_fit_are_refused(template, prompt, sentence):
    with pytest.raises(InputError, match=sentence):
        encode_completion(byte_tokenizer(template), ANSWER, prompt=prompt)


@pytest.mark.parametrize("bos", [False, True])
def test_many_texts_are_encoded_as_one_by_one(bos):
    """More than one chunk of them, on threads; and after a call that left the backend truncating and padding."""
    tokenizer = byte_tokenizer(CHATML, bos=bos, eos="<|im_end|>")
    texts = [f"{'the sky is blue ' * (i % 7)}{i} ä" for i in range(1300)]
    prompts = [user(text) if i % 3 else text for i, text in enumerate(texts)]
    answers = [assistant(text) if i % 3 else text for i, text in enumerate(texts)]
    tokenizer(texts[:2], truncation=True, max_length=3, padding="max_length")
    assert encode_prompts(tokenizer, prompts) == [encode_prompt(tokenizer, prompt) for prompt in prompts]
    singly = [encode_completion(tokenizer, a, prompt=p) for p, a in zip(prompts, answers, strict=True)]
    assert encode_completions(tokenizer, answers, prompts=prompts) == singly
    assert len({len(row) for row in singly}) > 5


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself():
    class Shouting(type(byte_tokenizer())):
        def encode(self, text, **kwargs):
            return super().encode(text.upper(), **kwargs)

    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Shouting
    texts = [f"the sky {i}" for i in range(600)]
    assert token_ids(tokenizer, texts) == [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert tokenizer.decode(token_ids(tokenizer, texts)[-1]) == "THE SKY 599"

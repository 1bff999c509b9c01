"""A tokenizer with one token per character, for the generated tasks and for tests without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*=() \n"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")


def character_tokenizer() -> PreTrainedTokenizerFast:
    r"""Build the tokenizer of the arithmetic tasks: digits, `+-*=()`, space and newline, 21 tokens in all.

    It pads on the left, has a padding token of its own (never EOS) and no BOS, and decoding restores the
    text exactly. `save_pretrained` and `AutoTokenizer.from_pretrained` work without a network.

    >>> tokenizer = character_tokenizer()
    >>> tokenizer.decode(tokenizer.encode("12 + 34=\n")) == "12 + 34=\n"
    True
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # both imports take a second
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    pad, eos, unk = SPECIAL_TOKENS
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()  # without a decoder the characters are joined by spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        unk_token=unk,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )

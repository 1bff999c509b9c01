"""The token ids of prompts and completions, which policies and reward models read alike.

A prompt is a text, or a list of chat messages `{"role", "content"}`, of which the tokenizer's chat template makes one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

from lit_rlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text: TypeAlias = str | list[dict[str, Any]]
_CHUNK = 512  # texts that a thread encodes at a time


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Return a prompt's token ids: BOS exactly once if the tokenizer adds one, and no EOS at the end.

    What the tokenizer puts before a text is kept and what it puts behind is not, since a completion
    follows. A BOS that the text already begins with is not doubled. Of chat messages the ids are those of the
    chat template's text up to where the assistant begins: the template alone decides about BOS.

    Raises:
        InputError: chat messages that the chat template refuses, or there is none.
    """
    return encode_prompts(tokenizer, [prompt])[0]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    completion: Text,
    eos_token_id: int | Sequence[int] | None = None,
    prompt: Text | None = None,
) -> list[int]:
    """Return a completion's token ids: no BOS, and EOS exactly once at the end.

    They are appended to the ids of `encode_prompt`. The two texts are never tokenized as one: a token
    across their border would shift what is prompt and what is learned.

    Args:
        tokenizer: a Hugging Face tokenizer.
        completion: a text, or chat messages; an EOS that ends it is not doubled.
        eos_token_id: what may end it, the first where it has none; the tokenizer's own if not given.
        prompt: the messages that the completion's follow. Theirs is what the chat template writes of all of them behind
            what it writes of the prompt; white space that it writes behind EOS is left out.

    Raises:
        InputError: there is no EOS, so that a model could never learn to stop; or see `encode_prompt`.
    """
    return encode_completions(tokenizer, [completion], eos_token_id, [prompt])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> list[list[int]]:
    """The ids of many prompts, see `encode_prompt`; a fast tokenizer encodes them on all cores."""
    plain = token_ids(tokenizer, [p if isinstance(p, str) else _template(tokenizer, p) for p in prompts])
    wrapped = iter(token_ids(tokenizer, [p for p in prompts if isinstance(p, str)], special=True))
    bos = tokenizer.bos_token_id
    return [
        _single_bos(_prefix(ids, next(wrapped)) + ids if isinstance(prompt, str) else ids, bos)
        for prompt, ids in zip(prompts, plain, strict=True)
    ]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Text],
    eos_token_id: int | Sequence[int] | None = None,
    prompts: Iterable[Text | None] = (),
) -> list[list[int]]:
    """The ids of many completions, see `encode_completion`; plain ones do not need their prompts."""
    ends = _ends(tokenizer, eos_token_id)
    texts = [text for text in completions if isinstance(text, str)]
    if len(texts) < len(completions):
        names = tuple(tokenizer.convert_ids_to_tokens(ends))
        pairs = zip(completions, prompts, strict=True)
        texts = [c if isinstance(c, str) else _cut(_turn(tokenizer, p, c), names) for c, p in pairs]
    return [_ended(ids, ends) for ids in token_ids(tokenizer, texts)]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """What `tokenizer.encode` returns of each text; many are encoded by threads, for which the backend frees the GIL.

    Threads of our own and not the backend's pool: that one must not be used on both sides of a fork.
    """
    one_by_one = (tokenizer.encode(text, add_special_tokens=special) for text in texts)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(texts) <= _CHUNK:
        return list(one_by_one)
    first = next(one_by_one)  # resets truncation and padding
    if backend.encode(texts[0], add_special_tokens=special).ids != first:  # the class does more than its backend
        return [first, *one_by_one]
    chunks = [texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        encoded = threads.map(lambda chunk: backend.encode_batch_fast(chunk, add_special_tokens=special), chunks)
        return [row.ids for chunk in encoded for row in chunk]


def with_own_pad_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy that pads with another token than EOS and `ends` where it does not, or with none."""
    ends = [tokenizer.eos_token_id, *ends]
    if tokenizer.pad_token_id not in (None, *ends):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    special, every = ([i for i in ids if i not in ends] for ids in (tokenizer.all_special_ids, range(len(tokenizer))))
    others = special or every
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0])
    return tokenizer


def _prefix(plain: list[int], wrapped: list[int]) -> list[int]:
    """What the tokenizer puts before a text."""
    starts = range(len(wrapped) - len(plain) + 1)
    return next((wrapped[:i] for i in starts if wrapped[i : i + len(plain)] == plain), [])


def _single_bos(ids: list[int], bos: int | None) -> list[int]:
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    return ids


def _ends(tokenizer: PreTrainedTokenizerBase, eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        eos_token_id = tokenizer.eos_token_id
    if eos_token_id is None:
        raise InputError(
            f"tokenizer {_name(tokenizer)} has no EOS token, so that no completion can end; set tokenizer.eos_token"
        )
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _ended(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids with one EOS at the end: the first of those that were there, or the first that may be."""
    end = ends[0]
    while ids and ids[-1] in ends:
        end = ids.pop()
    return [*ids, end]


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], generate: bool = True) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"tokenizer {_name(tokenizer)} has no chat template, and the data has chat messages; give tokenizer=... of "
            "a chat model, set tokenizer.chat_template, or use plain texts"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(str(message.get("role")) for message in messages)
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"the chat template of tokenizer {_name(tokenizer)} refuses messages of the roles {roles}: {reason}"
        ) from error
    return str(text)


def _turn(tokenizer: PreTrainedTokenizerBase, prompt: Text | None, completion: list[dict[str, Any]]) -> str:
    """The text of a chat completion: what the template writes of both, behind what it writes of the prompt."""
    if not isinstance(prompt, list):
        raise InputError(
            "a completion of chat messages needs a prompt of chat messages, which the template writes first"
        )
    start, text = _template(tokenizer, prompt), _template(tokenizer, [*prompt, *completion], generate=False)
    if not text.startswith(start):
        same = next((i for i, (a, b) in enumerate(zip(start, text, strict=False)) if a != b), len(text))
        raise InputError(
            f"the chat template of tokenizer {_name(tokenizer)} writes a conversation that does not begin with its "
            f"prompt: {text[same : same + 30]!r} where the prompt has {start[same : same + 30]!r}; use a template "
            "that only appends"
        )
    return text[len(start) :]


def _cut(text: str, ends: tuple[str, ...]) -> str:
    """The text without the white space that a template writes behind EOS."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(ends) else text


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)

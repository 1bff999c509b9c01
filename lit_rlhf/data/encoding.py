"""Token ids of a run's rows: every text is encoded once, many at a time, and remembered."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lit_rlhf.data.token_cache import TokenCache
from lit_rlhf.errors import InputError
from lit_rlhf.text import Text, encode_completions, encode_prompts
from lit_rlhf.types import Row

TextKey: TypeAlias = str | bytes
_Ids: TypeAlias = dict[TextKey, "array[int]"]


class Encoder:
    """The token ids of prompts and of what follows them, as every algorithm reads them; see `lit_rlhf.text`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        eos_token_ids: what may end a completion, the first where it has none.
        vocabulary: how many ids the model can read; None where that is not known.

    Attributes:
        truncate: cut what exceeds a limit, instead of refusing it: the beginning of a prompt behind its BOS, and the
            end of a completion, which then has no EOS.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int], vocabulary: int | None = None) -> None:
        self.tokenizer, self.eos_token_ids, self.vocabulary = tokenizer, list(eos_token_ids), vocabulary
        self.truncate = False
        self._known: dict[str, tuple[_Ids, _Ids]] = {}  # by place: of prompts, of completions

    def prepare(
        self, rows: Sequence[Row], columns: Sequence[str] = (), place: str = "", folder: str | Path | None = None
    ) -> None:
        """Encode the prompts of `rows`, and the completions in `columns` where a row has them, unless they are known.

        Args:
            rows: all rows of a pass.
            columns: `"completion"`, or `"chosen"` and `"rejected"`.
            place: what the rows are for. What was known of earlier rows of the same place is forgotten, so that data
                that is generated anew for every pass takes the memory of one pass.
            folder: where token ids are kept for the next run, see `TokenCache`.

        Raises:
            InputError: the model cannot read a token of them.
        """
        disk = TokenCache(folder, self.tokenizer) if folder is not None else None
        of_prompts, of_completions = self._known.get(place, ({}, {}))
        prompts: dict[TextKey, Text] = {text_key(row["prompt"]): row["prompt"] for row in rows}
        new = {key: prompt for key, prompt in prompts.items() if key not in of_prompts}
        found = _encoded(disk, ["prompts"], new, lambda: encode_prompts(self.tokenizer, list(new.values())))
        of_prompts = {key: of_prompts[key] if key in of_prompts else found[key] for key in prompts}

        pairs = ((row["prompt"], row[c]) for row in rows for c in columns if row.get(c) is not None)
        completions: dict[TextKey, tuple[Text, Text]] = {_completion_key(*pair): pair for pair in pairs}
        pending = {key: pair for key, pair in completions.items() if key not in of_completions}
        found = _encoded(
            disk, ["completions", *self.eos_token_ids], pending, lambda: self._completions(pending.values())
        )
        of_completions = {key: of_completions[key] if key in of_completions else found[key] for key in completions}
        for rows_of_ids in (of_prompts, of_completions):
            self._check_readable(rows_of_ids.values())
        self._known[place] = of_prompts, of_completions

    def prompt(self, prompt: Text, limit: int | None = None) -> list[int]:
        """Ids of a prompt, at most `limit`.

        Raises:
            InputError: it is longer, and `truncate` is off.
        """
        key = text_key(prompt)
        known = next((known[key] for known, _ in self._known.values() if key in known), None)
        ids = encode_prompts(self.tokenizer, [prompt])[0] if known is None else known.tolist()
        self._check(len(ids), limit)
        return self._end_of(ids, limit)

    def row(self, row: Row, columns: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Ids of a row's prompt and of the completions in `columns`, each of which fits into `limit` with the prompt.

        What is too long is cut from the prompt first, down to half of the limit, and then from the completions.

        Raises:
            InputError: it is longer, and `truncate` is off.
        """
        prompt, completions = self.prompt(row["prompt"]), [self._completion(row["prompt"], row[c]) for c in columns]
        longest = max(map(len, completions), default=0)
        self._check(len(prompt) + longest, limit)
        if limit is None:
            return [prompt, *completions]
        prompt = self._end_of(prompt, max(limit - longest, limit // 2))
        return [prompt, *(ids[: limit - len(prompt)] for ids in completions)]

    def length(self, row: Row, columns: Sequence[str] = ()) -> int:
        """Tokens of a row's prompt and of the longest completion in `columns`, nothing cut."""
        prompt, *completions = self.row(row, [column for column in columns if row.get(column) is not None])
        return len(prompt) + max(map(len, completions), default=0)

    def _completion(self, prompt: Text, completion: Text) -> list[int]:
        key = _completion_key(prompt, completion)
        known = next((known[key] for _, known in self._known.values() if key in known), None)
        return self._completions([(prompt, completion)])[0] if known is None else known.tolist()

    def _completions(self, pairs: Iterable[tuple[Text, Text]]) -> list[list[int]]:
        prompts, completions = zip(*pairs, strict=True)
        return encode_completions(self.tokenizer, completions, self.eos_token_ids, prompts)

    def _check_readable(self, rows: Iterable[Sequence[int]]) -> None:
        highest = max((max(ids) for ids in rows if ids), default=0)
        if self.vocabulary is not None and highest >= self.vocabulary:
            raise InputError(
                f"tokenizer: it makes the token {highest} of the data, and the model's vocabulary has only "
                f"{self.vocabulary}: give the model's own tokenizer, or resize the model's embeddings"
            )

    def _check(self, length: int, limit: int | None) -> None:
        if limit is not None and length > limit and not (self.truncate and limit > 1):
            raise InputError(
                f"data: a row of {length} tokens does not fit the model, which has room for {max(limit, 0)}; shorten "
                "it, or give data.long_rows=drop or truncate"
            )

    def _end_of(self, prompt: list[int], limit: int | None) -> list[int]:
        """The last tokens of a prompt, behind its BOS."""
        if limit is None or len(prompt) <= limit:
            return prompt
        start = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
        return start + prompt[len(prompt) - limit + len(start) :]


def text_key(text: Text) -> TextKey:
    """What a text is remembered by: a text itself, a digest of chat messages."""
    return text if isinstance(text, str) else _digest(text)


def _completion_key(prompt: Text, completion: Text) -> TextKey:
    """A chat completion's ids depend on its prompt, since the template writes both; a text's do not."""
    return completion if isinstance(completion, str) else _digest([prompt, completion])


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).digest()


def _encoded(disk: TokenCache | None, kind: Sequence[Any], texts: Iterable[TextKey], encode: Any) -> _Ids:
    """The ids of the texts by their keys, from the disk or from `encode`."""
    keys = list(texts)
    if not keys:
        return {}
    rows = encode() if disk is None else disk.get([kind, [k if isinstance(k, str) else k.hex() for k in keys]], encode)
    return dict(zip(keys, (array("i", row) for row in rows), strict=True))

"""Token ids on disk, so that a run does not encode what an earlier one has.

A file of the folder holds the ids of one list of texts by one tokenizer, and is named by a digest of both: another
tokenizer, chat template or text never finds it. What cannot be read is as good as not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from lit_rlhf.errors import InputError


class TokenCache:
    """Token ids by what they were encoded from.

    Args:
        folder: where the files are, or will be.
        tokenizer: a fast one: its rules can be written down and compared.

    Raises:
        InputError: the tokenizer is another one.
    """

    def __init__(self, folder: str | Path, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise InputError(
                f"data.token_cache needs a fast tokenizer, and {name!r} is none; leave data.token_cache out"
            )
        self.folder = Path(folder).expanduser()
        rules = [tokenizers.__version__, transformers.__version__, type(tokenizer).__qualname__, backend.to_str()]
        own = [getattr(tokenizer, "chat_template", None), tokenizer.bos_token_id, tokenizer.eos_token_id]
        self._rules = json.dumps([rules, own], sort_keys=True, default=str)

    def get(self, texts: Any, encode: Callable[[], list[list[int]]]) -> list[list[int]]:
        """The ids of `texts`, from the folder, or else from `encode` and put there.

        Args:
            texts: anything that JSON can hold and that decides, with the tokenizer, what `encode` returns.
            encode: returns a list of ids for each text.
        """
        digest = hashlib.sha256(self._rules.encode())
        digest.update(json.dumps(texts).encode())
        file = self.folder / f"{digest.hexdigest()[:32]}.tokens"
        found = _read(file)
        if found is None:
            found = encode()
            _write(file, found)
        return found


def _check(ids: torch.Tensor, lengths: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes() + lengths.numpy().tobytes()).hexdigest()


def _write(file: Path, rows: Sequence[Sequence[int]]) -> None:
    """Write under a name of this process and rename: the other ranks and runs see a whole file or none."""
    flat = array("i", (token for row in rows for token in row))
    ids, lengths = torch.tensor(flat, dtype=torch.int32), torch.tensor([len(row) for row in rows], dtype=torch.int32)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"ids": ids, "lengths": lengths, "check": _check(ids, lengths)}, temporary)
        temporary.replace(file)
    except OSError as error:
        raise InputError(
            f"data.token_cache: {file} cannot be written ({error.strerror}); give a folder that can"
        ) from None


def _read(file: Path) -> list[list[int]] | None:
    try:
        saved = torch.load(file, weights_only=True)
        ids, lengths = saved["ids"], saved["lengths"]
        if saved["check"] != _check(ids, lengths):
            return None
        return [row.tolist() for row in ids.split(lengths.tolist())]
    except Exception:  # of torch, pickle, zipfile, ...: not there, or not whole
        return None

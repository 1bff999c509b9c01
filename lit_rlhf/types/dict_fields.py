"""Reading tensors out of a user's dictionary: each is checked for its kind and shape, and refused in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import InputError


def given_keys(batch: object) -> dict[str, Any]:
    """What a user's dictionary holds, without the keys whose value is None."""
    if not isinstance(batch, Mapping):
        raise InputError(f"batch: it is a {type(batch).__name__}; expected a dictionary of tensors")
    return {str(key): value for key, value in batch.items() if value is not None}


def check_keys(given: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Refuse a key that is not known, with the nearest that is, and the lack of a required one."""
    known = [*required, *optional]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
            raise InputError(f"batch: unknown key {key!r}; {hint}")
    for key in required:
        if key not in given:
            raise InputError(
                f"batch: {key!r} is missing, given are {', '.join(given) or 'none'}; "
                f"expected {', '.join(required)} at least"
            )


class Fields:
    """The tensors of a dictionary by key. A layout such as `"BL"` names the axes; a letter has one size throughout.

    Args:
        batch: keys to tensors, or to what `torch.as_tensor` makes one of.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self.batch = batch
        self._sizes: dict[str, int] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.batch

    def ids(self, key: str, layout: str) -> Tensor:
        """Token ids, int64."""
        value = self._read(key, layout)
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise InputError(
                f"batch: {key!r} holds {str(value.dtype).removeprefix('torch.')}; expected token ids, integers"
            )
        return value.long()

    def mask(self, key: str, layout: str) -> Tensor:
        """Zeros and ones of any type, as bool."""
        value = self._read(key, layout)
        if not bool(((value == 0) | (value == 1)).all()):
            raise InputError(
                f"batch: {key!r} holds other numbers than 0 and 1; expected a mask, 1 where a token counts"
            )
        return value.bool()

    def numbers(self, key: str, *layouts: str) -> Tensor:
        """Numbers in one of the layouts, without gradient, float32 unless they are float64."""
        value = self._read(key, *layouts).detach()
        return value if value.dtype == torch.float64 else value.float()

    def _read(self, key: str, *layouts: str) -> Tensor:
        if key not in self.batch:
            raise InputError(
                f"batch: {key!r} is missing, given are {', '.join(self.batch)}; expected {_axes(*layouts)}"
            )
        try:
            value = torch.as_tensor(self.batch[key])
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(self.batch[key]).__name__
            raise InputError(f"batch: {key!r} is no tensor but a {kind} ({error}); expected one") from error
        layout = next((layout for layout in layouts if len(layout) == value.ndim), None)
        fits = layout and all(self._sizes.get(axis, n) == n for axis, n in zip(layout, value.shape, strict=True))
        if layout is None or not fits or not value.numel():
            known = [f"{axis} is {self._sizes[axis]}" for axis in sorted(set("".join(layouts))) if axis in self._sizes]
            where = f", where {' and '.join(known)}" if known else ", none of them empty"
            raise InputError(f"batch: {key!r} has the shape {list(value.shape)}; expected {_axes(*layouts)}{where}")
        self._sizes |= dict(zip(layout, value.shape, strict=True))
        return value


def check_ids(key: str, ids: Tensor, counts: Tensor, vocabulary: int | None = None) -> None:
    """Refuse what is no token id where `counts` is true: -100, say, which marks labels to leave out.

    Args:
        key: of the ids, for the sentence.
        ids: of any shape.
        counts: a mask of the ids' shape.
        vocabulary: ids are below this number, where it is known.
    """
    wrong = counts & (ids < 0)
    if bool(wrong.any()):
        raise InputError(f"batch: {key!r} holds {int(ids[wrong][0])} where a token is; expected ids from 0")
    wrong = counts & (ids >= vocabulary) if vocabulary is not None else wrong
    if bool(wrong.any()):
        raise InputError(
            f"batch: {key!r} holds {int(ids[wrong][0])} where a token is; expected ids below {vocabulary}, the size of "
            "the vocabulary"
        )


def check_finite(key: str, value: Tensor, counts: Tensor | None = None) -> None:
    """Refuse NaN and infinities, with `counts`, a mask of the value's shape, only where it is true."""
    wrong = ~torch.isfinite(value) if counts is None else counts & ~torch.isfinite(value)
    if bool(wrong.any()):
        where = "" if counts is None else " where a token is"
        raise InputError(f"batch: {key!r} holds {float(value[wrong][0])}{where}; expected finite numbers")


def _axes(*layouts: str) -> str:
    return " or ".join(f"[{', '.join(layout)}]" for layout in layouts)

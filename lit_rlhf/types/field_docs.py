"""What `help(Experience)` shows of a batch: all of its fields with their shapes, as the comments beside them say."""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from dataclasses import fields
from typing import TypeVar

T = TypeVar("T")
_FIELD = re.compile(r"^    (\w+): ([^=#]*[^=# ])(?: = [^#]*[^# ])? *# (.+)$", re.MULTILINE)


def with_fields(cls: type[T]) -> type[T]:
    """Add the fields of a dataclass or named tuple, those of its bases included, to its docstring."""
    lines: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        source = "".join(linecache.getlines(getattr(sys.modules[base.__module__], "__file__", None) or ""))
        _, _, body = source.partition(f"\nclass {base.__name__}")
        for name, kind, comment in _FIELD.findall(re.split(r"\n(?=[^\s#)])", body)[0]):
            lines[name] = f"    {name} ({kind}): {comment}"
    names = getattr(cls, "_fields", None) or [field.name for field in fields(cls)]  # type: ignore[arg-type]
    known = [lines[name] for name in names if name in lines]
    if cls.__doc__ and known:
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", "Fields:", *known])
    return cls

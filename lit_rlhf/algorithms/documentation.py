"""What `help(DAPO)` shows: one docstring and one signature of all that an algorithm takes, whichever class reads it.

Defaults are those of constructors and class attributes, descriptions those of the docstrings' `Args:`, the objective is
the module's docstring. Nothing is written a second time, and a user's subclass is described in the same way.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from inspect import Parameter, Signature, getattr_static
from types import FunctionType
from typing import Any, Literal
from weakref import WeakKeyDictionary

_ALGORITHMS = "lit_rlhf.algorithms."
_written: WeakKeyDictionary[type, str] = WeakKeyDictionary()  # docstrings as they stand in the source
_WIDTH = 112  # of a line of `help()`, which indents by four
_AROUND_EXAMPLE = """\
Example:

    from lightning.pytorch import Trainer
    from lit_rlhf import {name}
    from lit_rlhf.data import ArithmeticData

    {module}
    Trainer(max_epochs=100).fit(module, datamodule=ArithmeticData())
"""


@dataclass(frozen=True)
class Argument:
    """A keyword argument of an algorithm: of its own constructor, or handed on to `home`."""

    name: str
    kind: str  # its annotation
    default: Any  # the one that counts for the algorithm; `...`: it depends on others, see the text
    text: str
    home: type

    def __str__(self) -> str:
        default = "" if self.default is ... else f" = {getattr(self.default, '__name__', repr(self.default))}"
        return f"{self.name} ({self.kind}{default})" + (f": {self.text}" if self.text else "")

    @property
    def parameter(self) -> Parameter:
        """For the signature, where the types of sixty arguments would bury what follows it."""
        return Parameter(self.name, Parameter.KEYWORD_ONLY, default=self.default)


def document(cls: type) -> None:
    """Give `cls` the docstring and the signature that describe all of its arguments and hooks."""
    _written[cls] = inspect.cleandoc(vars(cls).get("__doc__") or "")
    before, _, _ = _written[cls].partition("\nArgs:\n")
    summary, _, rest = before.strip().partition("\n\n")
    sections = [summary, rest]
    if cls.__module__.startswith(_ALGORITHMS) and not cls.__name__.endswith("Module"):
        rest, _, module = rest.partition("Example:\n")
        example = _AROUND_EXAMPLE.format(name=cls.__name__, module=module.strip())
        sections = [summary, sys.modules[cls.__module__].__doc__ or "", rest, example]
    found = arguments(cls)
    sections += [*_argument_sections(cls, found), _hook_section(cls)]
    cls.__doc__ = "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"
    cls.__signature__ = Signature([argument.parameter for argument in found.values()])  # type: ignore[attr-defined]


def arguments(cls: type) -> dict[str, Argument]:
    """All keyword arguments by name: its own first, then what each class behind it takes of the rest."""
    found: dict[str, Argument] = {}
    said = described(cls)
    for home, names in _homes(cls):
        texts = described(home)
        for parameter in _named(home):
            name = parameter.name
            if name not in found and (names is None or name in names):
                kind, default = _kind(parameter, home), parameter.default
                if name in said and home is not cls:
                    default = ...  # the algorithm has its own, which its docstring states
                elif default is None and isinstance(of_class := getattr_static(cls, name, None), (str, int, float)):
                    kind, default = kind.removesuffix(" | None"), of_class
                found[name] = Argument(name, kind, default, said.get(name, ""), home)
            if name in found and not found[name].text:
                found[name] = replace(found[name], text=texts.get(name, ""))
    return found


def described(cls: type) -> dict[str, str]:
    """`{name: description}` of the `Args:` in the docstring of a class."""
    text = _written.get(cls) or inspect.cleandoc(vars(cls).get("__doc__") or "")
    _, _, section = text.partition("\nArgs:\n")
    items = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.split(r"\n\S", section)[0], flags=re.MULTILINE)
    return {name: " ".join(lines.split()) for name, lines in items}


def _homes(cls: type) -> Iterator[tuple[type, set[str] | None]]:
    """The classes whose constructors read the keywords, each with the names that reach it; None: all."""
    names: set[str] | None = None
    for home in cls.__mro__:
        if not _is_ours(home) or "__init__" not in vars(home):
            continue
        yield home, names
        rest = [p for p in _parameters(home) if p.kind is Parameter.VAR_KEYWORD]
        if not rest:
            return
        if (fields := _fields(rest[0].annotation, home)) is not None:
            names = fields if names is None else names & fields
        for part in vars(home).get("argument_parts", ()):
            yield part, names


def _is_ours(home: type) -> bool:
    """Whether it is a class of algorithms, and neither Lightning's nor a mixin."""
    return hasattr(home, "argument_parts")


def _parameters(home: type) -> list[Parameter]:
    return list(inspect.signature(vars(home)["__init__"]).parameters.values())[1:]


def _named(home: type) -> list[Parameter]:
    return [p for p in _parameters(home) if p.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)]


def _fields(annotation: Any, home: type) -> set[str] | None:
    """The names of the `Unpack[TypedDict]` that `**rest` is annotated with; None where it is not."""
    inside = re.fullmatch(r"(?:\w+\.)?Unpack\[(\w+)\]", annotation) if isinstance(annotation, str) else None
    typed = [getattr(sys.modules[home.__module__], inside[1], None)] if inside else typing.get_args(annotation)
    return set(typed[0].__annotations__) if typed and typed[0] else None


def _kind(parameter: Parameter, home: type) -> str:
    """An annotation as it is in the source, names of `Literal`s replaced by their choices."""
    annotation, names = parameter.annotation, vars(sys.modules[home.__module__])
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def choices(name: re.Match[str]) -> str:
        alias = names.get(name[0])
        return " | ".join(map(repr, typing.get_args(alias))) if typing.get_origin(alias) is Literal else name[0]

    written_out = re.sub(r"\b[A-Z]\w+", choices, text)
    return re.sub(r"Literal\[([^]]*)\]", lambda inside: inside[1].replace(", ", " | "), written_out)


def _argument_sections(cls: type, found: dict[str, Argument]) -> Iterator[str]:
    for home in dict.fromkeys(argument.home for argument in found.values()):
        lines = [str(argument) for argument in found.values() if argument.home is home]
        heading = "Args:" if home is cls else f"Args of `{home.__name__}`:"
        yield "\n".join([heading, *(_hanging(line) for line in lines)])


def _hook_section(cls: type) -> str:
    """What a subclass may override: the methods whose docstring begins with "Hook"."""
    hooks = {}
    for base in filter(_is_ours, reversed(cls.__mro__)):
        for name, method in vars(base).items():
            if isinstance(method, FunctionType) and (method.__doc__ or "").startswith("Hook"):
                text = re.sub(r"^Hook[^:]*: ", "", inspect.cleandoc(method.__doc__ or "").split("\n\n")[0])
                hooks[name] = f"{name}{_call(method)}: {' '.join(text.split())}"
    return "\n".join(["Hooks, to override in a subclass:", *map(_hanging, hooks.values())]) if hooks else ""


def _call(method: FunctionType) -> str:
    names = list(inspect.signature(method).parameters)[1:]
    return f"({', '.join(names)}) -> {method.__annotations__.get('return', 'None')}"


def _hanging(line: str) -> str:
    return textwrap.fill(line, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)

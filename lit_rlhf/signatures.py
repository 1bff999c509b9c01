"""The keywords that a class or function takes, read from its source without importing it."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lit_rlhf.errors import InputError

_SIMPLE = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "Path": (str,),
}
_LISTS = ("Sequence", "Iterable", "list", "tuple")
_MAPPINGS = ("Mapping", "dict")


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the known name closest to `name`, or the list of them when none is close.

    Upper and lower case are alike. A name without its folder is compared with the names inside folders, too.
    """
    known = sorted(known)
    close = _closest(name, known)
    inside = _closest(name, [path.rpartition("/")[2] for path in known])
    found = close or [path for path in known if path.rpartition("/")[2] in inside]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else f"; known: {', '.join(known)}"


def _closest(name: str, known: Iterable[str]) -> list[str]:
    spelt = {other.lower(): other for other in known}
    return [spelt[other] for other in difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.6)]


@dataclass(frozen=True)
class Signature:
    """The keywords that a class or function takes."""

    parameters: Mapping[str, ast.expr | None]  # name -> annotation
    open: bool  # takes keywords that cannot be known here
    module: str = ""  # where it stands, and so where its annotations' names are looked up

    def check(self, key: str, value: Any, path: str) -> None:
        """Raise an `InputError` if `key` is no parameter or `value` is missing or cannot be one."""
        if value == "???":
            raise InputError(f"'{path}.{key}' is missing; give {path}.{key}=...")
        if key not in self.parameters:
            if self.open:
                return
            raise InputError(f"unknown key '{path}.{key}'{nearest(key, self.parameters)}")
        self._check_inside(key, value, path)
        if not (isinstance(value, str) and "${" in value) and not _may_be(value, self.parameters[key]):
            kinds = [name for part in _parts(self.parameters[key]) if (name := ast.unparse(part)) != "None"]
            raise InputError(
                f"'{path}.{key}' must be {' or '.join(kinds)}, got {'null' if value is None else repr(value)}"
            )

    def _check_inside(self, key: str, value: Any, path: str) -> None:
        """Check the keys of a value that stands for a dataclass of settings."""
        inside = _settings(self.parameters[key], self.module)
        if inside is None or value is None or (isinstance(value, str) and "${" in value):
            return
        if not isinstance(value, Mapping):
            raise InputError(
                f"'{path}.{key}' has keys of its own, got {value!r}; known: {', '.join(inside.parameters)}"
            )
        for name, setting in value.items():
            inside.check(str(name), setting, f"{path}.{key}")


@cache
def signature_of(target: str) -> Signature | None:
    """The keywords of a dotted import path, from its source; None where the source cannot be found."""
    found = _find(target)
    if found is None:
        return None
    node, module = found
    if isinstance(node, ast.FunctionDef):
        return _of_function(node, module)
    return _of_class(node, module)


def _of_function(node: ast.FunctionDef, module: str, skip: int = 0) -> Signature:
    named = [*node.args.posonlyargs, *node.args.args][skip:] + node.args.kwonlyargs
    parameters = {argument.arg: argument.annotation for argument in named}
    rest = node.args.kwarg
    if rest is None:
        return Signature(parameters, open=False, module=module)
    annotation = rest.annotation
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Unpack"):
        typed = _find(f"{module}.{ast.unparse(annotation.slice)}")
        if typed is not None and isinstance(typed[0], ast.ClassDef):
            return Signature(_fields(typed[0], typed[1]) | parameters, open=False, module=module)
    return Signature(parameters, open=True, module=module)


def _of_class(node: ast.ClassDef, module: str) -> Signature | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _of_function(item, module, skip=1)
    if _is_dataclass(node):
        return Signature(_fields(node, module), open=False, module=module)
    for base in node.bases:
        signature = signature_of(f"{module}.{ast.unparse(base)}")
        if signature is not None:
            return signature
    return None


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _settings(annotation: ast.expr | None, module: str) -> Signature | None:
    """The signature of the dataclass that an annotation such as `LoRA | Mapping[str, Any] | None` names."""
    for name in map(ast.unparse, _parts(annotation)):
        found = _find(f"{module}.{name}") if name.isidentifier() and name not in (*_SIMPLE, "None") else None
        if found is not None and isinstance(found[0], ast.ClassDef) and _is_dataclass(found[0]):
            return _of_class(found[0], found[1])
    return None


def _fields(node: ast.ClassDef, module: str) -> dict[str, ast.expr | None]:
    """Annotated names of a TypedDict or dataclass and of its bases."""
    fields: dict[str, ast.expr | None] = {}
    for base in node.bases:
        found = _find(f"{module}.{ast.unparse(base)}")
        if found is not None and isinstance(found[0], ast.ClassDef):
            fields |= _fields(found[0], found[1])
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            fields[item.target.id] = item.annotation
    return fields


def _find(target: str) -> tuple[ast.ClassDef | ast.FunctionDef, str] | None:
    """The definition behind a dotted path and the module it stands in; re-exports are followed."""
    module, _, name = target.rpartition(".")
    tree = _parse(module) if module else None
    body = tree.body if tree is not None else []
    for node in [*body, *(inner for outer in body if isinstance(outer, ast.If) for inner in outer.body)]:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node, module
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(f"{node.module}.{alias.name}")
    return None


@cache
def _parse(module: str) -> ast.Module | None:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)  # finds a top-level name without importing it
    if spec is None:
        return None
    places = [Path(p).joinpath(*rest) for p in spec.submodule_search_locations or ()]
    files = [f for place in places for f in (place / "__init__.py", place.with_suffix(".py"))]
    if spec.origin and not rest:
        files.insert(0, Path(spec.origin))
    for file in files:
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def _fits(value: Any, kind: ast.expr) -> bool | None:
    """Whether a plain value can be what an annotation names; None where that cannot be told here."""
    if isinstance(kind, ast.Constant) and kind.value is None:
        return value is None
    if isinstance(kind, ast.Name) and kind.id in _SIMPLE:
        return type(value) in _SIMPLE[kind.id]
    if isinstance(kind, ast.Subscript):
        of, inside = ast.unparse(kind.value), kind.slice
        if of in _LISTS and isinstance(value, list):
            given = inside.elts if isinstance(inside, ast.Tuple) else [inside]
            if len(given) == 1 or ast.unparse(given[-1]) == "...":
                given = given[:1] * len(value)
            return len(given) == len(value) and all(map(_may_be, value, given))
        if of in (*_LISTS, *_MAPPINGS):
            return of in _MAPPINGS and isinstance(value, Mapping)
    return None


def _may_be(value: Any, annotation: ast.expr | None) -> bool:
    fits = [_fits(value, kind) for kind in _parts(annotation)]
    return not fits or any(fit is not False for fit in fits)


def _parts(annotation: ast.expr | None) -> list[ast.expr]:
    """The alternatives of an annotation: two of `int | None`, `Optional[int]` or either in quotes."""
    if annotation is None:
        return []
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _parts(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp):
        return _parts(annotation.left) + _parts(annotation.right)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("Optional", "Union"):
        inside = annotation.slice
        parts = [part for x in (inside.elts if isinstance(inside, ast.Tuple) else [inside]) for part in _parts(x)]
        return parts + [ast.Constant(None)] * (ast.unparse(annotation.value) == "Optional")
    return [annotation]

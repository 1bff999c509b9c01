"""What `--help` prints: the choices of every group with a line each, and the keys, read from the yaml files."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_rlhf.config import choices, conf_dir, signature_of, yaml_folders

_OF_ALL = ("experiment", "debug", "preset")  # whose files set keys of other groups
_LEFT = 28  # columns before what explains a choice or key
_KEY = re.compile(r"(?P<indent> *)(?P<key>[a-z]\w*):(?P<value>[^#]*)(?:# (?P<comment>.*))?")
_END = """
-m                              a run for each of several values, given as KEY=A,B
--cfg job                       show the configuration that the arguments make, and stop
hydra.run.dir=FOLDER            where the run's files go
"""


def usage(
    name: str, primary: Mapping[str, Any], arguments: Sequence[str], elsewhere: Iterable[str] = ()
) -> Iterator[str]:
    """The lines of the page of one entry point.

    Args:
        name: of the entry point and its yaml file.
        primary: that file's content.
        arguments: of the command line; of every choice among them the keys are listed.
        elsewhere: keys to leave out, as another key decides them.
    """
    folders = yaml_folders(arguments)
    entries = [entry for entry in primary["defaults"] if isinstance(entry, dict)]
    default = {group: choice for entry in entries for group, choice in entry.items()}
    groups = choices(primary["defaults"], folders)
    given = [argument.partition("=")[::2] for argument in arguments]
    if chosen := {group: choice for group, choice in given if choice in groups.get(group, ())}:
        for group, choice in chosen.items():
            yield f"\n{group}={choice}: {_about(_file(folders, group, choice))}"
            content = _content(folders, group, choice)
            yield from _sets(content) if group in _OF_ALL else _keywords(group, content, {*elsewhere})
        return
    for group in (group for group in groups if group in default):  # the others are chosen by themselves
        yield f"\n{group}=" + (f"{default[group]}, or another of" if default[group] else "")
        for choice in groups[group]:
            yield from _entry(f"  {choice}", _about(_file(folders, group, choice)))
    yield "\nkeys beside those of the groups" if groups else "\nkeys"
    yield from _keys(conf_dir() / f"{name}.yaml")
    if groups:
        yield f"\nkeys of a choice: {next(iter(groups))}={default[next(iter(groups))]} --help"
    yield _END.rstrip()


def _content(folders: Sequence[Path], group: str, choice: str) -> dict[str, Any]:
    """What a choice's yaml file holds, with that of the choices of its group that it begins with."""
    content: dict[str, Any] = yaml.safe_load(_file(folders, group, choice).read_text(encoding="utf-8")) or {}
    entries = content.get("defaults", [])
    for name in (entry for entry in entries if isinstance(entry, str) and entry != "_self_"):
        content = _content(folders, group, name) | content
    overridden = [entry for entry in entries if isinstance(entry, dict)]
    content["defaults"] = {key.removeprefix("override /"): x for entry in overridden for key, x in entry.items()}
    return content


def _keywords(path: str, content: Mapping[str, Any], elsewhere: Collection[str]) -> Iterator[str]:
    """The arguments of what a choice builds, one thing or several that have names."""
    signature = signature_of(str(content.get("_target_")))
    if signature is not None:
        for key, annotation in sorted(signature.parameters.items()):
            if f"{path}.{key}" not in elsewhere and not isinstance(content.get(key), dict):
                yield from _entry(f"  {path}.{key}", None if annotation is None else ast.unparse(annotation))
        yield f"  their defaults and meanings: python -m pydoc {content['_target_']}"
    for name, inside in content.items():
        if isinstance(inside, dict) and name != "defaults":
            yield from _keywords(f"{path}.{name}", inside, elsewhere)


def _sets(content: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The values that a choice gives keys of other groups."""
    yield from (f"  {group}={choice}" for group, choice in content.get("defaults", {}).items())
    for key, value in content.items():
        if isinstance(value, dict) and key != "defaults":
            yield from _sets(value, f"{path}{key}.")
        elif key != "defaults":
            yield f"  {path}{key}={value}"


def _keys(file: Path) -> Iterator[str]:
    """The keys of a yaml file that stand in no group, those inside others by their whole name."""
    inside, of_all = "", None
    for line in file.read_text(encoding="utf-8").splitlines():
        if (found := _KEY.match(line)) is None or (found["indent"] and not inside):
            continue
        key, value = found["key"], found["value"].strip()
        if found["indent"]:
            yield from _entry(f"  {inside}.{key}={value}", found["comment"] or of_all)
        elif value:
            yield from _entry(f"  {key}={value}", found["comment"])
        if not found["indent"]:
            inside, of_all = ("" if value or key in ("defaults", "hydra") else key), found["comment"]


def _file(folders: Sequence[Path], group: str, choice: str) -> Path:
    return next(file for folder in folders if (file := folder / group / f"{choice}.yaml").is_file())


def _about(file: Path) -> str:
    """The first comment of a yaml file, but for Hydra's own."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line[2:].rstrip(":") for line in lines if line.startswith("# ") and not line.startswith("# @")), "")


def _entry(left: str, right: str | None) -> Iterator[str]:
    """`left` in its column and `right` beside it, on as many lines as that takes."""
    width = max(60, min(shutil.get_terminal_size((120, 0)).columns, 120))
    lines = textwrap.wrap(right or "", width - _LEFT - 2)
    yield f"{left:<{_LEFT}}  {lines[0]}" if lines else left
    yield from (f"{'':<{_LEFT}}  {line}" for line in lines[1:])

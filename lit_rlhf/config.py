"""Check a command line before anything heavy is imported: choices, keys and simple types.

The valid keys of a config node are the arguments of its `_target_`, read from the source without importing
it, so defaults live once, in Python signatures, and an error costs a third of a second. No Hydra here: the
entry points hand in plain dictionaries and argument lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.signatures import nearest as nearest
from lit_rlhf.signatures import signature_of as signature_of

_IMPLIED = {"data.path": "data=file", "model.path": "model=pretrained"}  # a path given chooses what reads it
_PATHS = (  # taken as they are written
    "data.path",
    "data.validation_path",
    "model.path",
    "pipeline.sft",
    "pipeline.reward_model",
    "tokenizer",
    "ckpt_path",
    "reference.path",
    "against.path",
    "judge",
)
_WITHOUT = {  # groups that a run can do without, and what Hydra reads for `group=null`
    "callbacks": ["~callbacks"],
    "logger": ["~logger"],
    "preset": ["~preset"],
    "debug": [],
    "experiment": [],
}
_SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
_SHARED_KINDS = {  # of the keys that every entry point has
    "seed": (int,),
    "plugins": (list,),
    "threads": (int, type(None)),
    "tokenizer": (str, dict, type(None)),
}


def conf_dir() -> Path:
    """The folder of the yaml files: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return next(d for d in (here / "conf", here.parent / "conf") if (d / "train.yaml").is_file())


def prepare_arguments(arguments: Sequence[str], primary: Mapping[str, Any]) -> list[str]:
    r"""Turn a user's command line into Hydra overrides.

    A group's choice is checked. `data.path=` and `model.path=` choose the group that reads them, unless it is
    chosen already; their values are quoted. `\n` in `data.prompt_template=` is a new line. `logger=null` leaves
    an optional group out. `algo.x=1` becomes `++algo.x=1`, because x need not stand in a yaml file to be valid:
    `check_config` compares it with the signature.

    Args:
        arguments: the arguments without the program's name.
        primary: the entry point's own yaml file; its defaults list says which groups there are.

    Raises:
        InputError: an unknown group, choice or key, with the nearest valid one.
    """
    groups, top_level = choices(primary["defaults"], yaml_folders(arguments)), set(primary) - {"defaults"}
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    implied = _implied({key.lstrip("+"): value for key, _, value in (a.partition("=") for a in arguments)}, groups)
    prepared = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, value = argument.partition("=")
        head = re.split("[./@]", key.lstrip("+"))[0]
        if key.startswith("~") and key[1:] in {*groups, *top_level} - {*_WITHOUT}:
            raise InputError(f"{argument}: nothing runs without it; choose {key[1:]}=...")
        if (
            head == "hydra" or key.startswith(("-", "~")) or (not equals and before.startswith("-"))
        ):  # a flag, or its value
            prepared.append(argument)
            continue
        if not equals:
            raise InputError(f"{argument!r} is no assignment; write {argument}=VALUE")
        if head not in groups and head not in top_level:
            raise InputError(f"unknown key {key!r}{nearest(head, {*groups, *top_level})}")
        if key in groups and key in _WITHOUT and value == "null":
            prepared += _WITHOUT[key]
            continue
        if key in groups:
            _check_choices(key, value, groups[key], sweep)
        if key.lstrip("+") in _PATHS and not sweep:
            _check_home(key, value)
            argument = f"{key}={quoted(value)}"
        if key.lstrip("+") == "data.prompt_template":
            argument = argument.replace("\\n", "\n")  # quotes of a shell leave both characters
        prepared.append(f"++{argument}" if "." in key and key[0] != "+" else argument)
    flags = [
        argument for argument in prepared if argument in ("-m", "--multirun")
    ]  # argparse wants the others together
    return [*flags, *implied, *(argument for argument in prepared if argument not in flags)]


def yaml_folders(arguments: Sequence[str]) -> list[Path]:
    """Where yaml files may be: our own, and the folder of the user's that `--config-dir` names."""
    named = [after for flag, after in pairwise(arguments) if flag in ("--config-dir", "-cd")]
    named += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config-dir=")]
    return [conf_dir(), *map(Path, named)]


def choices(defaults: Iterable[str | Mapping[str, Any]], folders: Sequence[Path]) -> dict[str, list[str]]:
    """The groups of a defaults list and their choices: yaml files, those in folders as `folder/name`.

    A folder in a group that the list has an entry of its own for, as `debug/steps`, is nothing to choose from.
    """
    entries = [str(next(iter(entry))) for entry in defaults if isinstance(entry, Mapping)]
    listed = [entry.removeprefix("optional ") for entry in entries if not entry.startswith("override ")]
    groups = {}
    for group in (name for name in listed if "/" not in name):
        files = [f.relative_to(folder).with_suffix("") for folder in folders for f in (folder / group).rglob("*.yaml")]
        kept = [file for file in files if file.parent.as_posix() not in {*listed} - {group}]
        groups[group] = sorted({file.relative_to(group).as_posix() for file in kept})
    return groups


def _implied(given: Mapping[str, str], groups: Iterable[str]) -> list[str]:
    """The overrides that follow from those a user gave: a path's group, and one limit of the run instead of two."""
    chosen = {key: choice.split("=")[0] for key, choice in _IMPLIED.items()}
    implied = [
        _IMPLIED[key] for key, group in chosen.items() if key in given and group in groups and group not in given
    ]
    if given.get("trainer.max_steps", "-1") == "-1":
        return implied
    epochs = given.get("trainer.max_epochs", "-1")
    if epochs not in ("-1", "null"):
        raise InputError(
            f"trainer.max_steps={given['trainer.max_steps']} and trainer.max_epochs={epochs} both limit the run; "
            "leave one of them out"
        )
    return [*implied, "++trainer.max_epochs=-1"] if "trainer.max_epochs" not in given else implied


def quoted(path: str) -> str:
    """`path` for Hydra's grammar, in which brackets, commas and the like have a meaning outside of quotes."""
    done = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    if done or "${" in path or path.startswith("{") or re.fullmatch(r"([A-Za-z_./][\w./-]*)?", path, re.ASCII):
        return path
    doubled = re.sub(r"\\+(?='|$)", lambda slashes: 2 * slashes[0], path)
    return "'" + doubled.replace("'", "\\'") + "'"


def _check_home(key: str, path: str) -> None:
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{key}={path}: there is no user of that name") from None


def _check_choices(group: str, value: str, known: Sequence[str], sweep: bool) -> None:
    if sweep and re.match(r"\s*(glob|shuffle|sort|tag)\(", value):  # Hydra's own ways to write several
        return
    listed = re.fullmatch(r"\s*choice\((.*)\)\s*", value)
    choices = [choice.strip() for choice in (listed[1] if listed else value).split(",")]
    for choice in choices:
        if choice not in known:
            raise InputError(f"unknown choice {group}={choice}{nearest(choice, known)}")
    if len(choices) > 1 and not sweep:
        raise InputError(f"{group}={','.join(choices)} are several runs; add -m to start one after the other")


def check_top_level(config: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Check the keys that stand in no group: names, types, and the range of those that every entry point has."""
    known = {*_SHARED_KINDS, *kinds, *(folder.name for folder in conf_dir().iterdir() if folder.is_dir())}
    if unknown := [key for key in config if key not in known]:  # of a yaml file; the command line's are refused before
        raise InputError(f"unknown key {unknown[0]!r}{nearest(str(unknown[0]), known)}")
    for key, allowed in {**_SHARED_KINDS, **kinds}.items():
        if key not in config:
            raise InputError(f"{key!r} is missing; give {key}=...")
        if type(config[key]) not in allowed:
            names = ["null" if kind is type(None) else kind.__name__ for kind in allowed]
            raise InputError(f"{key!r} must be {' or '.join(names)}, got {config[key]!r}")
    for name in config["plugins"]:
        if not (isinstance(name, str) and all(part.isidentifier() for part in name.split("."))):
            raise InputError(f"plugins: {name!r} is no module; give import paths, [my_package.my_losses]")
    if not 0 <= config["seed"] < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, got {config['seed']}")
    if config["threads"] is not None and config["threads"] < 1:
        raise InputError(f"threads must be at least 1, or null for one per core, got {config['threads']}")


def check_targets(config: Mapping[str, Any], groups: Iterable[str]) -> None:
    """Check that each of these groups says what to build."""
    for group in groups:
        if not isinstance((config.get(group) or {}).get("_target_"), str):
            raise InputError(f"{group}._target_ must be an import path; choose one with {group}=...")


def check_log_model(value: Any) -> None:
    """Check what of a run becomes a W&B artifact.

    Raises:
        InputError: it is none of the three.
    """
    if value not in (True, False, "all"):
        raise InputError(f"logger.wandb.log_model must be true, false or all, got {value!r}")


def check_elsewhere(config: Mapping[str, Any], elsewhere: Mapping[str, str]) -> None:
    """Refuse the keys `group.name` that another key decides, which `elsewhere` says how to write."""
    for key, instead in elsewhere.items():
        group, _, name = key.partition(".")
        if name in config[group]:
            raise InputError(f"{key!r} would have no effect; write {instead}")


def check_config(config: Mapping[str, Any], path: str = "") -> None:
    """Compare every node that has a `_target_` with the signature of what it builds.

    Raises:
        InputError: a key that the target does not take, or a value of the wrong simple type.
    """
    target = config.get("_target_")
    if target is not None:
        signature = signature_of(str(target))
        for key, value in config.items():
            if key not in _SPECIAL and signature is not None:
                signature.check(key, value, path)
    siblings = [key for key, value in config.items() if isinstance(value, Mapping) and "_target_" in value]
    for key, value in config.items():
        where = f"{path}.{key}" if path else str(key)
        if path in ("callbacks", "logger") and key not in siblings and value is not None:
            raise InputError(f"unknown key {where!r}{nearest(str(key), siblings)}")
        inside = {f"{where}.{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {where: value}
        for place, node in inside.items():
            if isinstance(node, Mapping):
                check_config(node, place)

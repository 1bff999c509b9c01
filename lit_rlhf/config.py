"""Check a command line before anything heavy is imported: choices, keys and simple types.

The valid keys of a config node are the arguments of its `_target_`, read from the source without importing
it, so defaults live once, in Python signatures, and an error costs a third of a second. No Hydra here: the
entry points hand in plain dictionaries and argument lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.signatures import nearest as nearest
from lit_rlhf.signatures import signature_of as signature_of

_IMPLIED = {"data.path": "data=file", "model.path": "model=pretrained"}  # a path given chooses what reads it
_ELSEWHERE = {  # what `train` itself hands over, and the key that decides it
    "algo.policy": "model.path=...",
    "algo.tokenizer": "tokenizer=...",
    "algo.reward_funcs": "reward.funcs=[...]",
    "algo.reward_weights": "reward.weights=[...]",
    "algo.sampling": "rollout.max_new_tokens=... and the like",
    "algo.seed": "seed=...",
    "trainer.callbacks": "callbacks.NAME._target_=...",
    "trainer.logger": "logger.NAME._target_=...",
    "rollout.group_size": "algo.group_size=...",
}
_PATHS = ("data.path", "data.validation_path", "model.path", "tokenizer", "ckpt_path")  # taken as they are written
_WITHOUT = {  # groups that a run can do without, and what Hydra reads for `group=null`
    "callbacks": ["~callbacks"],
    "logger": ["~logger"],
    "preset": ["~preset"],
    "debug": [],
    "experiment": [],
}
_SUBGROUPS = ("debug/steps",)  # what train.yaml chooses from by itself
_SPECIAL = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
_TOP_LEVEL_KINDS = {
    "seed": (int,),
    "validate_first": (bool,),
    "plugins": (list,),
    "threads": (int, type(None)),
    "ckpt_path": (str, type(None)),
    "tokenizer": (str, dict, type(None)),
}
_NEEDED = ("algo", "data", "model", "reward", "rollout", "trainer")  # groups that every run instantiates
_GIVEN = ("policy", "tokenizer", "reward_funcs", "sampling", "seed")  # what `train` hands to the algorithm


def conf_dir() -> Path:
    """The folder of the yaml files: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return next(d for d in (here / "conf", here.parent / "conf") if (d / "train.yaml").is_file())


def prepare_arguments(arguments: Sequence[str], top_level: Iterable[str]) -> list[str]:
    """Turn a user's command line into Hydra overrides.

    A group's choice is checked. `data.path=` and `model.path=` choose the group that reads them, unless it is
    chosen already; their values are quoted. `logger=null` leaves an optional group out. `algo.x=1` becomes
    `++algo.x=1`, because x need not stand in a yaml file to be valid: `check_config` compares it with the signature.

    Args:
        arguments: the arguments without the program's name.
        top_level: keys of the primary config.

    Raises:
        InputError: an unknown group, choice or key, with the nearest valid one.
    """
    groups = {folder.name: _choices(folder) for folder in conf_dir().iterdir() if folder.is_dir()}
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    implied = _implied({key.lstrip("+"): value for key, _, value in (a.partition("=") for a in arguments)})
    prepared = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, value = argument.partition("=")
        head = re.split("[./@]", key.lstrip("+"))[0]
        if (
            head == "hydra" or key.startswith(("-", "~")) or (not equals and before.startswith("-"))
        ):  # a flag, or its value
            prepared.append(argument)
            continue
        if not equals:
            raise InputError(f"{argument!r} is no assignment; write {argument}=VALUE")
        if head not in groups and head not in set(top_level):
            raise InputError(f"unknown key {key!r}{nearest(head, {*groups, *top_level})}")
        if key in _WITHOUT and value == "null":
            prepared += _WITHOUT[key]
            continue
        if key in groups:
            _check_choices(key, value.split(","), groups[key], sweep)
        if key.lstrip("+") in _PATHS and not sweep:
            argument = f"{key}={_quoted(value)}"
        prepared.append(f"++{argument}" if "." in key and key[0] != "+" else argument)
    return implied + prepared


def _choices(group: Path) -> list[str]:
    """The yaml files of a group, those in its folders as `folder/name`, but for folders that are groups themselves."""
    files = [file.relative_to(group).with_suffix("") for file in group.rglob("*.yaml")]
    return sorted(file.as_posix() for file in files if f"{group.name}/{file.parent}" not in _SUBGROUPS)


def _implied(given: Mapping[str, str]) -> list[str]:
    """The overrides that follow from those a user gave: a path's group, and one limit of the run instead of two."""
    implied = [choice for key, choice in _IMPLIED.items() if key in given and choice.split("=")[0] not in given]
    if given.get("trainer.max_steps", "-1") == "-1":
        return implied
    epochs = given.get("trainer.max_epochs", "-1")
    if epochs not in ("-1", "null"):
        raise InputError(
            f"trainer.max_steps={given['trainer.max_steps']} and trainer.max_epochs={epochs} both limit the run; "
            "leave one of them out"
        )
    return [*implied, "++trainer.max_epochs=-1"] if "trainer.max_epochs" not in given else implied


def _quoted(path: str) -> str:
    """`path` for Hydra's grammar, in which brackets, commas and the like have a meaning outside of quotes."""
    quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    if quoted or "${" in path or path.startswith("{") or re.fullmatch(r"([A-Za-z_./][\w./-]*)?", path, re.ASCII):
        return path
    doubled = re.sub(r"\\+(?='|$)", lambda slashes: 2 * slashes[0], path)
    return "'" + doubled.replace("'", "\\'") + "'"


def _check_choices(group: str, choices: Sequence[str], known: Sequence[str], sweep: bool) -> None:
    for choice in choices:
        if choice not in known:
            raise InputError(f"unknown choice {group}={choice}{nearest(choice, known)}")
    if len(choices) > 1 and not sweep:
        raise InputError(f"{group}={','.join(choices)} are several runs; add -m to start one after the other")


def check_run(config: Mapping[str, Any]) -> None:
    """Check all that `train` will read, before anything heavy is imported.

    Raises:
        InputError: the first thing that cannot be used.
    """
    _check_top_level(config)
    for group in _NEEDED:
        if not isinstance((config.get(group) or {}).get("_target_"), str):
            raise InputError(f"{group}._target_ must be an import path; choose one with {group}=...")
    target = config["algo"]["_target_"]
    signature = signature_of(target)
    if signature is not None and not signature.open and not set(_GIVEN) <= set(signature.parameters):
        raise InputError(f"algo._target_={target} is no algorithm: it does not take {', '.join(_GIVEN)}")
    if (precision := config["trainer"].get("precision")) in ("bf16-true", "16-true"):  # Lightning converts the batches
        raise InputError(
            f"trainer.precision={precision} cannot convert these batches; write model.dtype=bfloat16 instead, "
            "without trainer.precision"
        )
    for key, instead in _ELSEWHERE.items():
        group, _, name = key.partition(".")
        if name in config[group]:
            raise InputError(f"{key!r} would have no effect; write {instead}")
    check_config(config)


def _check_top_level(config: Mapping[str, Any]) -> None:
    for key, kinds in _TOP_LEVEL_KINDS.items():
        if type(config[key]) not in kinds:
            names = ["null" if kind is type(None) else kind.__name__ for kind in kinds]
            raise InputError(f"{key!r} must be {' or '.join(names)}, got {config[key]!r}")
    if not 0 <= config["seed"] < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, got {config['seed']}")
    if config["threads"] is not None and config["threads"] < 1:
        raise InputError(f"threads must be at least 1, or null for one per core, got {config['threads']}")


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
        if isinstance(value, Mapping):
            check_config(value, where)

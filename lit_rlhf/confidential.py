"""Secrets come from the environment, and nothing that a run says or leaves behind holds one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from lit_rlhf.errors import InputError

# keys of a configuration; `pad_token` and its kin are none, nor is anything that counts tokens
_KEY = re.compile(
    r"(?:^|_)(?:api_?key|(?:access|secret|private)_key|secret|pass(?:word|wd|phrase)|pwd|credentials?|authorization"
    r"|bearer|(?:api|auth|access|bearer|hf|hub|refresh|session)_token)$|^token$",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(?:^|_)(?:key|token|cookie|auth)$", re.IGNORECASE)  # of HTTP, which name no column and no cache
_MAYBE = re.compile(r"(?:^|_)keys?$", re.IGNORECASE)  # `answer_key` is none; what the value looks like decides
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|-")  # between those of `apiKey` and `API-KEY`
# values: what their issuers begin them with, and the password of a URL, wherever they stand in a text
_SECRET = re.compile(
    r"(?<![\w/-])sk-[\w-]*?(?=[A-Za-z]*\d)[A-Za-z0-9]{16,}"  # OpenAI and its kin; no model's name has such a word
    r"|(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16})"
    r"|://[^/\s@:$]*:[^/\s@$]+@"
)
_SECRET_OF_KEY = re.compile(  # W&B and others: hexadecimal; or letters of both kinds and digits, and no words
    r"sk-\S+|[0-9a-f-]{32,}|[0-9A-F-]{32,}|(?=\S*[a-z])(?=\S*[A-Z])(?=\S*\d)[\w+/=.-]{24,}"
)
_VARIABLE = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_NO_SECRETS = ("", "EMPTY", "none")  # what servers without keys are given
_SHORTEST = 8  # characters; what is shorter stands in texts by chance


def check_no_secrets(config: Any, path: str = "", secret: bool = False) -> None:
    """Refuse a secret that is written out: it would be in the run's folder, its loggers and the list of processes.

    Args:
        config: a plain configuration, interpolations not resolved.
        path: where it stands.
        secret: whether a key above it says that it is one.

    Raises:
        InputError: there is one; says how to give it instead.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            check_no_secrets(value, f"{path}.{key}".lstrip("."), secret or _names_secret(str(key), path))
    elif isinstance(config, list):
        for i, value in enumerate(config):
            check_no_secrets(value, f"{path}.{i}", secret)
    elif isinstance(config, (bool, type(None))):
        pass
    elif (secret and not _is_harmless(str(config))) or _looks_secret(str(config), path):
        raise InputError(
            f"'{path}' is a secret, and a run writes its configuration down; put it into an environment variable "
            f"and give {path}='${{oc.env:NAME}}'"
        )


def _names_secret(key: str, path: str) -> bool:
    name = _WORDS.sub("_", key)
    return bool(_KEY.search(name) or (path.endswith("headers") and _HEADER.search(name)))


def _looks_secret(text: str, path: str) -> bool:
    key = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
    maybe = _MAYBE.search(_WORDS.sub("_", key))
    return bool(_SECRET.search(text) or (maybe and _SECRET_OF_KEY.fullmatch(text)))


def _is_harmless(text: str) -> bool:
    return "${" in text or text in _NO_SECRETS


def masked(text: str) -> str:
    """The text without the values of environment variables that are secrets by their names."""
    secrets = {value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text

"""Secrets come from the environment, and nothing that a run says or leaves behind holds one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from lit_rlhf.errors import InputError

# keys of a configuration; `pad_token` and its kin are none, nor is anything that counts tokens
_KEY = re.compile(
    r"(?:^|_)(?:api_?key|(?:access|secret|private)_key|secret|pass(?:word|wd|phrase)|credentials?|authorization"
    r"|(?:api|auth|access|bearer|hf|hub|refresh|session)_token)$|^token$",
    re.IGNORECASE,
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
            name = str(key).replace("-", "_")
            check_no_secrets(value, f"{path}.{key}".lstrip("."), secret or bool(_KEY.search(name)))
    elif isinstance(config, list):
        for i, value in enumerate(config):
            check_no_secrets(value, f"{path}.{i}", secret)
    elif secret and not isinstance(config, (bool, type(None))) and not _is_harmless(str(config)):
        raise InputError(
            f"'{path}' is a secret, and a run writes its configuration down; put it into an environment variable "
            f"and give {path}='${{oc.env:NAME}}'"
        )


def _is_harmless(text: str) -> bool:
    return "${" in text or text in _NO_SECRETS


def masked(text: str) -> str:
    """The text without the values of environment variables that are secrets by their names."""
    secrets = {value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text

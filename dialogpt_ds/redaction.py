"""Keys and tokens kept out of logs, configuration files, checkpoints and wandb."""

import os
import re
from typing import Any

LEFT_OUT = "(left out)"
"""Stands where a secret was."""
SHORTEST = 8
"""Shorter values of environment variables are no secrets: 0, true, none."""
_NAMES_OF_VARIABLES = re.compile(r"(^|_)(KEY|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD)(_|$)")
_NAMES_OF_KEYS = re.compile(
    r"^(token|password|passwd|secret)$|api_?key|secret_?key|access_?(key|token)|auth_?token|_password$", re.I
)
_USER = re.compile(r"(?<=://)[^/\s@?]+@")
_QUERY = re.compile(r"(?P<address>\b[a-z][a-z0-9+.-]*://[^\s?\"']+\?)[^\s\"']+", re.I)
_HEADER = re.compile(r"(?P<name>\b(?:authorization|x-[a-z-]*(?:token|key))\s*[:=]\s*)(?:(?:bearer|basic|token)\s+)?[^\s\"']+", re.I)
_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|wandb_v\d_[A-Za-z0-9_]{20,})")
"""Tokens of Hugging Face, GitHub, AWS and wandb."""


def without_secrets(value: Any) -> Any:
    """Return a value of plain types with its secrets left out.

    Secrets are what follows the `?` of an address, the user in front of its `@`, authorization headers, tokens of well-known shapes, the
    values of environment variables called ..._KEY, ..._TOKEN, ..._SECRET or ..._PASSWORD, and what a dictionary keeps under such a name.
    """
    if isinstance(value, str):
        return _text_without(value)
    if isinstance(value, dict):
        return {key: _entry_without(key, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(entry) for entry in value]
    return value


def _entry_without(key: Any, entry: Any) -> Any:
    if isinstance(entry, str) and entry and isinstance(key, str) and _NAMES_OF_KEYS.search(key):
        return LEFT_OUT
    return without_secrets(entry)


def _text_without(text: str) -> str:
    for name, secret in os.environ.items():
        if len(secret) >= SHORTEST and not secret.startswith("/") and _NAMES_OF_VARIABLES.search(name):
            text = text.replace(secret, f"${name}")
    text = _USER.sub("", text)
    text = _QUERY.sub(rf"\g<address>{LEFT_OUT}", text)
    text = _HEADER.sub(rf"\g<name>{LEFT_OUT}", text)
    return _SHAPES.sub(LEFT_OUT, text)

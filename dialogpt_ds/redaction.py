"""Keys and tokens kept out of logs, configuration files, checkpoints and wandb."""

import os
import re
from typing import Any

LEFT_OUT = "(left out)"
"""Stands where a secret was."""
SHORTEST = 8
"""Shorter values of environment variables are no secrets: 0, true, none."""
_VARIABLES = r"(?:[A-Z0-9]+_)*(?:KEY|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD)(?:_[A-Z0-9]+)*"
_NAMES_OF_VARIABLES = re.compile(rf"^{_VARIABLES}$")
_NAMES_OF_KEYS = re.compile(
    r"^(token|password|passwd|secret|authorization|cookie)$|api_?key|secret_?key|access_?(key|token)|auth_?token|_password$",
    re.I,
)
_PATTERNS = (
    # The user of an address, up to the last @ before its path or query: a password may have one.
    (re.compile(r"(?<=://)(?=[^/\s?\"']*@)[^\s?\"']*@", re.I), f"{LEFT_OUT}@"),
    (re.compile(r"(?P<kept>\b[a-z][a-z0-9+.-]*://[^\s?\"']+\?)(?!\(left)[^\s\"']+", re.I), rf"\g<kept>{LEFT_OUT}"),
    (
        re.compile(r"(?P<kept>\b(?:authorization|cookie|[a-z-]*-(?:token|key))\s*:\s*)[^\"'\n]+", re.I),
        rf"\g<kept>{LEFT_OUT}",
    ),
    (re.compile(rf"(?P<kept>\b{_VARIABLES}=)(?P<quote>[\"']?)[^\s\"']+(?P=quote)"), rf"\g<kept>{LEFT_OUT}"),
    (
        re.compile(r"(?P<kept>(?:^|\s)(?:-u|--user|--oauth2-bearer|--[a-z0-9-]*(?:token|password))[ =])\S+"),
        rf"\g<kept>{LEFT_OUT}",
    ),
    # Tokens of Hugging Face, GitHub, GitLab, AWS and wandb by their shapes.
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|AKIA[A-Z0-9]{16}|wandb_v\d_\w{20,})"
        ),
        LEFT_OUT,
    ),
)


def without_secrets(value: Any) -> Any:
    """Return a value of plain types with its secrets left out.

    Secrets are what follows the `?` of an address, the user in front of its `@`, authorization headers and options of
    curl, values of environment variables called ..._KEY, ..._TOKEN, ..._SECRET or ..._PASSWORD (as they are, and as
    NAME=value), tokens of well-known shapes, and what a dictionary keeps under such a name.
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
        if (
            len(secret) >= SHORTEST
            and secret in text
            and _NAMES_OF_VARIABLES.search(name)
            and not os.path.exists(secret)
        ):
            text = text.replace(secret, f"${name}")
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text

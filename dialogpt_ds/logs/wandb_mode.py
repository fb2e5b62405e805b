"""Where wandb's runs go: to its server with a key, to this machine's disk without one."""

import os
from typing import Literal
from urllib.parse import urlparse

Mode = Literal["auto", "online", "offline", "disabled"]
ASIDE = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}
"""Values of WANDB_MODE that are not online."""


def server() -> str:
    """Return the address of wandb's server: WANDB_BASE_URL, else of wandb's settings, else its own default."""
    stated = os.environ.get("WANDB_BASE_URL")
    if stated:
        return stated
    from wandb.sdk import wandb_setup

    return str(wandb_setup.singleton().settings.base_url)


def choose_mode(asked: Mode) -> tuple[Mode, str]:
    """Return the mode that holds, and why it is offline where that was not asked for.

    The flag wins over WANDB_MODE; without both it is online. Online needs a key: without one it is offline, since wandb
    would ask a person who may not be there.
    """
    mode: Mode = asked
    if asked == "auto":
        stated = os.environ.get("WANDB_MODE", "")
        mode = ASIDE.get(stated, "online")  # type: ignore[assignment]
    if mode == "online" and not has_key():
        return "offline", f"no key for {urlparse(server()).hostname}: wandb login, or WANDB_API_KEY"
    return mode, ""


def has_key() -> bool:
    """Look for a key where wandb looks: the environment, then the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import read_netrc_auth

    try:
        return read_netrc_auth(host=server()) is not None
    except AuthenticationError:  # there is one, and it is malformed: wandb will say so
        return True

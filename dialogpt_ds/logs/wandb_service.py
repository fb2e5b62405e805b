"""wandb's server and its process on this machine, as far as training must not wait for them."""

import contextlib
import http.client
import sys
import urllib.error
import urllib.request

import psutil

WANDB_SECONDS = 10.0
"""A server that says nothing for so long is down."""


def answers(address: str) -> bool:
    """Return whether something at an address says anything."""
    try:
        with urllib.request.urlopen(address, timeout=WANDB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False


def end_service() -> None:
    """End wandb's own process, which would keep this one waiting for a server that hangs. What it took is on the disk
    by then."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "wandb-core" in child.name():
                child.kill()
    quiet_teardown()
    with contextlib.suppress(Exception, SystemExit):  # it ends the program where it finds its process gone
        import wandb

        wandb.teardown()


def quiet_teardown() -> None:
    """Keep wandb from saying with a traceback, when Python ends, that its process is gone."""
    usual = sys.unraisablehook
    sys.unraisablehook = lambda about: None if "teardown_atexit" in repr(about.object) else usual(about)

"""The end of a rank that has met something the other ranks don't know of."""

import os
import sys
import traceback
from typing import NoReturn

from dialogpt_ds.distributed.host_watch import HostContact
from dialogpt_ds.errors import EXIT_RUN_FAILED
from dialogpt_ds.redaction import without_secrets
from dialogpt_ds.training.settings import Settings

LOST_CONTACT = (
    "closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "NCCL",
    "DistBackendError",
)
"""What gloo and NCCL say where another rank is gone."""


def end_alone(error: Exception, settings: Settings, contact: HostContact) -> NoReturn:
    """End this rank at once: what went wrong here, the others don't know of, and anything done together would wait for them."""
    rank = settings.world.rank
    if isinstance(error, RuntimeError) and any(words in f"{type(error).__name__} {error}" for words in LOST_CONTACT):
        print(
            f"run failed: rank {rank} has lost contact with {contact.lost() or 'another rank'}, which has ended or can't be reached; its "
            "own message, if it had time for one, stands above. The last complete checkpoint is kept: the same command goes on from it. "
            f"({without_secrets((str(error).splitlines() or [repr(error)])[0][:200])})",
            file=sys.stderr,
        )
        if settings.arguments.verbose:
            print(without_secrets(traceback.format_exc()), file=sys.stderr)
    else:
        print(f"run failed: rank {rank} met an error that nobody foresaw:", file=sys.stderr)
        print(without_secrets(traceback.format_exc()), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_RUN_FAILED)

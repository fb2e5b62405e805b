"""The deepspeed launcher above this process, and what it was told: a script is told nothing of the host file."""

import argparse
import os
from pathlib import Path

import psutil

from dialogpt_ds.errors import UserError

RUNNERS = ("deepspeed", "ds", "deepspeed.launcher.runner")


def check_hostfile_is_there() -> None:
    """Refuse a run whose host file is named on the launcher's command line and missing: the launcher only warns, and runs here alone.

    Raises:
        UserError: with the file's name as it was given, and where it was looked for.
    """
    for ancestor in _ancestors():
        try:
            words, folder = ancestor.cmdline(), ancestor.cwd()
        except psutil.Error:
            continue
        named = hostfile_of(words)
        if named is not None and not Path(folder, named).is_file():
            raise UserError(
                f"the deepspeed command names --hostfile {named}, which does not exist (looked in {folder}); it would have trained on this "
                "host alone. Correct the name, or leave --hostfile out to train here"
            )


def hostfile_of(command: list[str]) -> str | None:
    """Return the host file that a command line names, if it is that of deepspeed's runner; None where it names none."""
    runner = next((at for at, word in enumerate(command[:4]) if os.path.basename(word) in RUNNERS), None)
    if runner is None:
        return None
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-H", "--hostfile")
    try:
        return parser.parse_known_args(command[runner + 1 :])[0].hostfile
    except (argparse.ArgumentError, SystemExit):
        return None


def _ancestors() -> list[psutil.Process]:
    try:
        return psutil.Process().parents()
    except psutil.Error:
        return []

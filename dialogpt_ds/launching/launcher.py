"""The deepspeed launcher above this process, and what it was told: a script is told nothing of the host file."""

import argparse
import os
import socket
from pathlib import Path

import psutil

from dialogpt_ds.errors import UserError
from dialogpt_ds.launching.hostfile import read_hostfile

RUNNERS = ("deepspeed", "ds", "deepspeed.launcher.runner")


def check_hostfile() -> None:
    """Refuse a run that the launcher made here alone although it was given a host file.

    It does so, with no more than a warning, where the file is missing, and without a word where it names a single host, whichever.

    Raises:
        UserError: with the file's name as it was given, and the way out.
    """
    for ancestor in _ancestors():
        try:
            words, folder = ancestor.cmdline(), ancestor.cwd()
        except psutil.Error:
            continue
        named = hostfile_of(words)
        if named is None:
            continue
        if not Path(folder, named).is_file():
            raise UserError(
                f"the deepspeed command names --hostfile {named}, which does not exist (looked in {folder}); it would have trained on this "
                "host alone. Correct the name, or leave --hostfile out to train here"
            )
        hosts = read_hostfile(Path(folder, named))
        if len(hosts) == 1 and "--no_ssh" not in words and not is_this_machine(hosts[0].name):
            raise UserError(
                f"--hostfile {named} names {hosts[0].name} alone, and the deepspeed command starts the processes of a single host on the "
                f"machine that it is started on, {socket.gethostname()}: start it on {hosts[0].name}, or add --force_multi"
            )


def is_this_machine(name: str) -> bool:
    """Return whether a host's name, or USER@name, means this machine; True where nobody knows the name."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name.rpartition("@")[2], None)}
    except OSError:
        return True
    own = {address.address.split("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses}
    return bool(found & own) or any(address.startswith("127.") for address in found)


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

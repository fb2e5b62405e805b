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

    It does so, with no more than a warning, where the file is missing, and without a word where it names a single host,
    whichever.

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
                f"the deepspeed command names --hostfile {named}, which does not exist (looked in {folder}); it would "
                "have trained on this host alone. Correct the name, or leave --hostfile out to train here"
            )
        chosen = chosen_hosts([host.name for host in read_hostfile(Path(folder, named))], words)
        if len(chosen) == 1 and not {"--no_ssh", "--force_multi"} & set(words) and not is_this_machine(chosen[0]):
            raise UserError(
                f"--hostfile {named}, with what else the deepspeed command says, leaves {chosen[0]} alone, and the "
                "processes of a single host are started on the machine that the command is started on, "
                f"{socket.gethostname()}: start it on {chosen[0]}, or add --force_multi"
            )


def is_this_machine(name: str) -> bool:
    """Return whether a host's name, or USER@name, means this machine; True where nobody knows the name."""
    name = name.rpartition("@")[2]
    if name.partition(".")[0] == socket.gethostname().partition(".")[0]:
        return True  # behind an address of somebody else's, as of a cloud
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError:
        return True
    own = {address.address.split("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses}
    return bool(found & own) or any(address.startswith("127.") for address in found)


def hostfile_of(command: list[str]) -> str | None:
    """Return the host file that a command line names, if it is that of deepspeed's runner; None where it names none."""
    options = _options_of(command)
    return options.hostfile if options is not None else None


def chosen_hosts(names: list[str], command: list[str]) -> list[str]:
    """Return the hosts that the runner's --include, --exclude and --num_nodes leave of those in the host file."""
    options = _options_of(command)
    if options is None:
        return names
    if options.include:
        included = {part.partition(":")[0] for part in options.include.split("@")}
        names = [name for name in names if name in included]
    # Without slots behind it, a whole host is left out.
    left_out = {part for part in (options.exclude or "").split("@") if ":" not in part}
    names = [name for name in names if name not in left_out]
    return names[: options.num_nodes] if options.num_nodes > 0 else names


def runner_at(command: list[str]) -> int | None:
    """Return which word of a command line is deepspeed's runner; None where none is."""
    return next((at for at, word in enumerate(command[:4]) if os.path.basename(word) in RUNNERS), None)


def _options_of(command: list[str]) -> argparse.Namespace | None:
    """Return the runner's options on hosts; None where a command line is not that of the runner."""
    runner = runner_at(command)
    if runner is None:
        return None
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-H", "--hostfile")
    parser.add_argument("-i", "--include", default="")
    parser.add_argument("-e", "--exclude", default="")
    parser.add_argument("--num_nodes", type=int, default=-1)
    try:
        return parser.parse_known_args(command[runner + 1 :])[0]
    except (argparse.ArgumentError, SystemExit):
        return None


def _ancestors() -> list[psutil.Process]:
    try:
        return psutil.Process().parents()
    except psutil.Error:
        return []

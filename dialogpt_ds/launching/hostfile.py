"""The launcher's hostfile: which hosts a run is on, and every line of it that would be misread."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dialogpt_ds.errors import UserError

ENTRY = "one host a line, as in: worker-0 slots=8"
_LINE = re.compile(r"^(\S+)\s+slots=(\d+)(.*)$", re.ASCII)
"""The beginning is what DeepSpeed's launcher looks for (launcher/runner.py); it ignores whatever comes after."""
_HARMLESS = re.compile(r"(\s+max_slots=\d+)?(\s+#.*)?\s*", re.ASCII)
"""What may come after the slots without meaning anything else: MPI's max_slots, and a comment."""
BYTE_ORDER_MARK = "\ufeff"
"""The byte order mark that some editors begin a file with."""
_NAME = re.compile(r"([\w.-]+@)?[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    """As ssh is given it: a name or an address, USER@ in front where the file has it."""
    slots: int
    """Processes on it, one for each GPU."""
    line: int
    """Number of the line, from 1."""


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a hostfile, in its order, which is that of the ranks.

    Lines that are empty or begin with # are left out, as DeepSpeed's launcher does; Windows line ends are no problem to
    it either.

    Raises:
        UserError: the file is missing, unreadable or names no host, or lines of it would be refused or misread: all of
            them at once.
    """
    hosts: list[Host] = []
    lines, problems = _lines(path), []
    if lines and lines[0].startswith(BYTE_ORDER_MARK):
        problems.append(
            f"{path}:1: begins with a byte order mark, which the launcher takes for a letter: save the file without it"
        )
    for number, line in enumerate(lines, start=1):
        text = line.strip().removeprefix(BYTE_ORDER_MARK)
        if not text or text.startswith("#"):
            continue
        place = f"{path}:{number}: {text!r}"
        match = _LINE.match(text)
        if match is None:
            problems.append(f"{place} {_why_not(text)}")
            continue
        host = Host(match[1], int(match[2]), number)
        problems += [f"{place} {problem}" for problem in _entry_problems(host, match[3])]
        problems += [f"{place} {_again(host, other)}" for other in hosts if other.name == host.name][:1]
        hosts.append(host)
    if problems:
        raise UserError("\n".join(problems))
    if not hosts:
        raise UserError(f"hostfile {str(path)!r} names no host: write {ENTRY}")
    return hosts


def _lines(path: Path) -> list[str]:
    if path.is_dir():
        raise UserError(f"hostfile {str(path)!r} is a folder; name a file with {ENTRY}")
    try:
        with path.open(encoding="utf-8") as file:  # universal newlines, as the launcher reads it
            return file.readlines()
    except FileNotFoundError as error:
        raise UserError(
            f"hostfile {str(path)!r} does not exist (looked in {path.absolute().parent}); the launcher would only warn "
            f"and start the run on this machine alone. Correct the path, or make the file with {ENTRY}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"hostfile {str(path)!r} is no text file in UTF-8: {error}; write it anew with {ENTRY}"
        ) from error
    except OSError as error:
        raise UserError(f"hostfile {str(path)!r} can't be read: {error.strerror}") from error


def _why_not(text: str) -> str:
    """Say why DeepSpeed's launcher would refuse a line, and what to write."""
    name, _, rest = text.partition(" " if " " in text else "\t")
    if name.lower().startswith("slots"):
        return f"has no host name in front of the slots: write {ENTRY}"
    number = re.search(r"slots\s*=\s*(\d+)", rest, re.IGNORECASE | re.ASCII)
    if number is None:
        return f"has no slots=N, the number of processes there, one for each GPU: write {name} slots=8"
    wanted = f"write {name} slots={number[1]}"
    if re.match(r"\s*slots\s*=", rest):
        return f"has spaces beside the =, which the launcher refuses: {wanted}"
    return f"must have slots=N, in small letters, right after the name: {wanted}"


def _entry_problems(host: Host, after: str) -> Iterator[str]:
    """Yield what is wrong with a line that the launcher accepts."""
    if host.slots == 0:
        yield "has 0 slots, so no process would run there: give the number of its GPUs, or put # in front of the line"
    if not _HARMLESS.fullmatch(after):
        yield (
            f"has {after.strip()!r} after slots={host.slots}, which the launcher ignores in silence: remove it, or say "
            "with slots= what it is meant to say"
        )
    if ":" in host.name:
        yield (
            "has a : in the name, and neither ssh nor pdsh takes a port (or an IPv6 address) there: give the port to "
            "the launcher (deepspeed --ssh_port) or as Port in ~/.ssh/config, and write the name or IPv4 address alone"
        )
    elif re.search(r"[\[\],]", host.name):
        yield (
            "names several hosts in a way that only pdsh knows, so that ranks would be counted wrong: write each "
            "on a line of its own"
        )
    elif not _NAME.fullmatch(host.name):
        yield "has a name with characters that no host name has: write a name or an IPv4 address, as ssh knows it"


def _again(host: Host, other: Host) -> str:
    if host.slots == other.slots:
        return f"names a host that line {other.line} has already, and the launcher refuses that: remove one of the two"
    return (
        f"names a host that line {other.line} has already with slots={other.slots}, and the launcher refuses that: "
        f"keep one line, with "
        "the number of its GPUs"
    )

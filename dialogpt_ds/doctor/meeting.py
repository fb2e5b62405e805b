"""The hosts' part in looking at the network between them, as python -m dialogpt_ds.doctor.meeting ROLE WORDS.

`hold PORT FOLDER TOKEN`, on the first host: it listens at the master port for as long as its standard input stays open,
and leaves a file of the token's name in the folder. `visit ADDRESS PORT TOKEN`, on every host meanwhile: it opens a
connection to that port and looks for the token's file; an empty word leaves that out.
"""

import errno
import json
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from dialogpt_ds.distributed.rendezvous import interface_towards, listen_everywhere
from dialogpt_ds.doctor.facts import after_mark
from dialogpt_ds.files import appears
from dialogpt_ds.launching.machine_facts import existing_part

MEETING_MARK, VISIT_MARK = "dialogpt-doctor-meeting ", "dialogpt-doctor-visit "
OPEN_SECONDS = 60.0
CONNECT_SECONDS = 6.0
VISIT_TOKEN_SECONDS = 5.0
"""How long a host may take to see a new file on a shared disk."""


@dataclass(frozen=True)
class MeetingPlace:
    """What the first host says of the place where the ranks meet."""

    address: str = ""
    port: int = 0
    port_problem: str = ""
    token: str = ""
    """Path of the file that was left in output_dir; "" where it could not be."""
    token_problem: str = ""


def port_problem(port: int) -> str:
    """Return why this process can't listen on a port; "" where it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that has just ended is no hindrance
        try:
            probe.bind(("", port))
            probe.listen()
        except OverflowError:
            return f"port {port} is none: ports go from 1 to 65535"
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} is in use{_user_of(port)}"
            return f"port {port} can't be listened on ({error.strerror})"
    return ""


def _user_of(port: int) -> str:
    """Return which process listens on a port, as far as this one may see it."""
    try:
        owners = {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr[1] == port
        }
        named = [f"{psutil.Process(pid).name()}, process {pid}" for pid in owners if pid]
    except psutil.Error:
        return ""
    return f" (by {'; '.join(named)})" if named else ""


def first_address() -> str:
    """Return the address that DeepSpeed's launcher takes of the first host: the first that `hostname -I` says."""
    try:
        said = subprocess.run(
            ["hostname", "-I"], capture_output=True, text=True, timeout=5.0, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(said.split()), "")


def accept_all(port: int) -> None:
    """Take every connection and close it."""
    server = listen_everywhere(port, 512)
    while True:
        server.accept()[0].close()


def hold(port: int, folder: str, name: str) -> None:
    """Listen until standard input ends."""
    token = existing_part(Path(folder)) / name
    answer: dict[str, Any] = {
        "address": first_address(),
        "port_problem": port_problem(port),
        "token": str(token),
        "token_problem": "",
    }
    if not answer["port_problem"]:
        threading.Thread(target=accept_all, args=(port,), daemon=True).start()
    try:
        token.write_text("")
    except OSError as error:
        answer["token_problem"] = f"{token.parent} can't be written to ({error.strerror})"
    print(MEETING_MARK + json.dumps(answer), flush=True)
    reader = threading.Thread(target=sys.stdin.read, daemon=True)
    reader.start()
    reader.join(OPEN_SECONDS)
    token.unlink(missing_ok=True)


@dataclass(frozen=True)
class Visit:
    """What a host finds on its way to the first one."""

    connect_problem: str = ""
    interface: str = ""
    """By which it reaches the master address; "" for the loopback, and where nothing leads there."""
    own_address: str = ""
    sees_token: bool | None = None
    """Whether the file is seen; None: not asked."""


def visit(address: str, port: int, token: str) -> Visit:
    """Go and look."""
    towards = interface_towards(address) if address else None
    interface, own = towards or ("", "")
    return Visit(
        _connect(address, port) if port else "",
        interface,
        own,
        appears(Path(token), VISIT_TOKEN_SECONDS) if token else None,
    )


def _connect(address: str, port: int) -> str:
    """Return what keeps a connection from being opened; "" where nothing does."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except TimeoutError:
        return f"no answer within {CONNECT_SECONDS:.0f} s, as where a firewall drops what comes"
    except ConnectionRefusedError:
        return "the connection was refused, by a firewall or because it went to another machine"
    except OSError as error:
        return str(error.strerror or error)
    return ""


def visit_in(output: str) -> Visit | None:
    """Return what a host's output says; None where it holds no answer."""
    said = after_mark(output, VISIT_MARK)
    return None if said is None else Visit(**json.loads(said))


def main() -> int:
    """Play the part that the command line names."""
    role, *words = sys.argv[1:]
    if role == "hold":
        port, folder, name = words
        hold(int(port), folder, name)
    else:
        address, port, token = words
        print(VISIT_MARK + json.dumps(asdict(visit(address, int(port or 0), token))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

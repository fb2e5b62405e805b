"""Another host's part in looking at the network: python -m dialogpt_ds.doctor.visit ADDRESS PORT TOKEN.

It opens a connection to the master port and looks for the token's file; an empty word leaves that out.
"""

import json
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from dialogpt_ds.distributed.rendezvous import interface_towards
from dialogpt_ds.doctor.facts import after_mark
from dialogpt_ds.files import appears

VISIT_MARK = "dialogpt-doctor-visit "
MEETING_SECONDS = 6.0
VISIT_TOKEN_SECONDS = 5.0
"""How long a host may take to see a new file on a shared disk."""


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
        _connect(address, port) if port else "", interface, own, appears(Path(token), VISIT_TOKEN_SECONDS) if token else None
    )


def _connect(address: str, port: int) -> str:
    """Return what keeps a connection from being opened; "" where nothing does."""
    try:
        socket.create_connection((address, port), timeout=MEETING_SECONDS).close()
    except TimeoutError:
        return f"no answer within {MEETING_SECONDS:.0f} s, as where a firewall drops what comes"
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
    """Print the answer."""
    address, port, token = sys.argv[1:4]
    print(VISIT_MARK + json.dumps(asdict(visit(address, int(port or 0), token))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

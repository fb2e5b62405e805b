"""The meeting of a run's processes at its master address: by which interface, and for how long one waits for the
others."""

import os
import socket
import sys
import threading
import time
from types import TracebackType

import psutil

from dialogpt_ds.errors import EXIT_RUN_FAILED

FIRST_WORD_SECONDS, SECONDS_BETWEEN_WORDS = 30.0, 120.0
RENDEZVOUS_SECONDS = 600.0
"""How long processes wait for each other at the start; DEEPSPEED_TIMEOUT (minutes) says otherwise."""


def meeting_place() -> str:
    """Return where the processes meet, as ADDRESS:PORT."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def name_interface() -> None:
    """Tell gloo and NCCL the interface that leads to the master address, where nobody has and it is another than the
    loopback.

    gloo would take the one that this host's name resolves to, often 127.0.1.1, and wait for minutes; NCCL the first
    that is neither loopback nor docker's. NCCL takes a name for a beginning but after a "=" (NVIDIA's guide);
    InfiniBand it finds by itself.
    """
    if {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} <= os.environ.keys():
        return
    found = interface_towards(os.environ.get("MASTER_ADDR", ""))
    if found is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={found[0]}")


def interface_towards(address: str) -> tuple[str, str] | None:
    """Return name and own address of the interface by which a host is reached; None for the loopback, and where nothing
    leads there."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.split("%")[0] == own for known in addresses):
            return None if _is_loopback(own) else (name, own)
    return None


def listen_everywhere(port: int, backlog: int) -> socket.socket:
    """Return a socket that listens on all addresses of this host, IPv6 ones too where there are any; raises OSError."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


class RendezvousWatch:
    """Says, while it is entered, that this process waits for others, and ends it when it has waited too long."""

    def __init__(self, rank: int, size: int, speaks: bool) -> None:
        self._who, self._size, self._speaks = f"rank {rank} on {socket.gethostname()}", size, speaks
        minutes = os.environ.get("DEEPSPEED_TIMEOUT", "")
        self._limit = 60.0 * int(minutes) if minutes.isdigit() and int(minutes) else RENDEZVOUS_SECONDS
        self._met = threading.Event()

    def __enter__(self) -> "RendezvousWatch":
        if self._size > 1:
            threading.Thread(target=self._wait, name="meeting", daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._met.set()

    def _wait(self) -> None:
        started, pause = time.monotonic(), FIRST_WORD_SECONDS
        while not self._met.wait(min(pause, max(started + self._limit - time.monotonic(), 0))):
            waited, pause = time.monotonic() - started, SECONDS_BETWEEN_WORDS
            over = waited >= self._limit
            if self._speaks or over:
                print(
                    f"{'run failed: ' if over else ''}{self._who} {'has waited' if over else 'waits'} at "
                    f"{meeting_place()} for the other processes, {self._size} in all ({waited:,.0f} of "
                    f"{self._limit:,.0f} s). Have all hosts started theirs, and do they reach this address and port? "
                    "python launch/doctor.py --hostfile HOSTS finds out",
                    file=sys.stderr,
                    flush=True,
                )
            if over:
                os._exit(EXIT_RUN_FAILED)

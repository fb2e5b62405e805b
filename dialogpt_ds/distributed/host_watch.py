"""A line from every host of a run to rank 0's: where it breaks, the run ends within a minute or so, instead of waiting
in a collective."""

import os
import resource
import selectors
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dialogpt_ds.distributed.collectives import all_gather, broadcast_from_rank0
from dialogpt_ds.distributed.rendezvous import listen_everywhere
from dialogpt_ds.distributed.world import World, spans_hosts
from dialogpt_ds.errors import EXIT_RUN_FAILED
from dialogpt_ds.launching.processes import is_task_of_scheduler

UNANSWERED = 4
"""Questions without an answer after which a host counts as lost; the first is asked after as long as there is between
two of them."""
SPEAKING_SECONDS = 3.0
"""How long a rank that meets an error of its own, in a collective say, has to speak for itself first."""
CONTACT_SECONDS = 15.0
WORD_SECONDS = 2.0
"""How long rank 0 listens to a new connection; a host says its few bytes at once."""
ALONE = "only --hang_timeout notices"
GOODBYE = b"."
TOKEN_BYTES = 32


@dataclass(frozen=True)
class PeerHost:
    """A host of the run, as its first rank there sees it."""

    rank: int
    name: str


class HostWatch:
    """Watches the other hosts from connect() to the end of the block. Does nothing on a single host.

    The first rank of each host holds a TCP connection to rank 0, over which nothing is said but goodbye; of srun and
    MPI every rank does, since nobody ends the others of a host there. The kernels ask each other whether they are still
    there (keep-alive, tcp(7)), also while both processes compute. A process that ends without goodbye closes its
    connection at once; a host or a link that is gone is noticed after `timeout` seconds. Whoever notices ends itself,
    its launcher ends the ranks beside it, and rank 0's end is noticed by all other hosts.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self._world, self._timeout = world, timeout
        self._peers: dict[socket.socket, PeerHost] = {}
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._who_is_lost = ""
        self._lock = threading.Lock()

    def __enter__(self) -> "HostWatch":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended.set()
        with self._lock:
            for peer in self._peers:
                with suppress(OSError):
                    peer.sendall(GOODBYE)
                peer.close()

    def connect(self) -> list[str]:
        """Begin to watch. Collective: every rank must call. Returns notes for the user: hosts that there is no line
        to."""
        hosts = self._hosts()
        if len(hosts) == 1 and spans_hosts(self._world) and self._timeout:
            return [
                f"warning: the hosts of this run can't be told apart (all are {hosts[0].name}), so that {ALONE} when "
                "one is lost"
            ]
        if len(hosts) == 1 or not self._timeout:
            return []
        failures = self._connect(hosts)
        if self._peers:
            threading.Thread(target=self._watch, name="host-contact", daemon=True).start()
        if not failures:
            return []
        return [
            f"warning: no line to {len(failures)} of the other hosts, so that {ALONE} when they are lost: {failures[0]}"
        ]

    def lost(self, seconds: float = 1.5) -> str:
        """Return the host that was lost, waiting so long for that to be known; "" where none was that this process has
        a line to."""
        if self._peers:
            self._lost.wait(seconds)
        return self._who_is_lost

    def _hosts(self) -> list[PeerHost]:
        """Return the hosts in order of their first ranks. Collective."""
        places = all_gather((_place(), socket.gethostname()))
        first: dict[str, PeerHost] = {}
        for rank, (place, name) in enumerate(places):
            first.setdefault(place, PeerHost(rank, name))
        return list(first.values())

    def _connect(self, hosts: list[PeerHost]) -> list[str]:
        """Connect the hosts' first ranks with rank 0. Collective. Returns what went wrong."""
        listener = _listener(len(hosts)) if self._world.is_first else None
        token, port = broadcast_from_rank0((uuid.uuid4().hex.encode(), listener.getsockname()[1]) if listener else None)
        mine = next((host for host in hosts[1:] if host.rank == self._world.rank), None)
        failure = None
        if mine is not None:
            try:
                peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONTACT_SECONDS)
                peer.sendall(token + self._world.rank.to_bytes(4, "big"))
                self._keep(peer, hosts[0])
            except OSError as error:
                failure = f"{mine.name} (rank {mine.rank}): {error}"
        if listener is not None:
            self._accept(listener, token, hosts)
        reports = all_gather((failure, [host.rank for host in self._peers.values()]))
        kept = reports[0][1]
        if mine is not None and mine.rank not in kept:
            self._drop()  # rank 0 was not there for it in time; the connection it never took will be reset
        missing = [
            f"{host.name} (rank {host.rank}): not seen by rank 0 in time" for host in hosts[1:] if host.rank not in kept
        ]
        return [failure for failure, _ in reports if failure] or missing

    def _accept(self, listener: socket.socket, token: bytes, hosts: list[PeerHost]) -> None:
        expected = {host.rank: host for host in hosts[1:]}
        deadline = time.monotonic() + CONTACT_SECONDS
        with listener:
            while expected and (left := deadline - time.monotonic()) > 0:
                listener.settimeout(left)
                try:
                    peer, _ = listener.accept()
                    peer.settimeout(WORD_SECONDS)
                    said = peer.recv(TOKEN_BYTES + 4, socket.MSG_WAITALL)
                except OSError:
                    continue  # a stranger that says nothing is forgotten, and closed with that
                host = (
                    expected.pop(int.from_bytes(said[TOKEN_BYTES:], "big"), None)
                    if said[:TOKEN_BYTES] == token
                    else None
                )
                if host is None:
                    peer.close()
                else:
                    self._keep(peer, host)

    def _drop(self) -> None:
        for peer in self._peers:
            peer.close()
        self._peers.clear()

    def _keep(self, peer: socket.socket, host: PeerHost) -> None:
        between = max(round(self._timeout / (UNANSWERED + 1)), 1)
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", between), ("TCP_KEEPINTVL", between), ("TCP_KEEPCNT", UNANSWERED)):
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[peer] = host

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, host in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, data=host)
            while selector.get_map() and not self._ended.is_set():
                for key, _ in selector.select(timeout=1.0):
                    with self._lock:
                        if self._ended.is_set():
                            return
                        lost = _how_lost(key.fileobj)
                    selector.unregister(key.fileobj)
                    if lost is not None:
                        self._give_up(key.data, lost)

    def _give_up(self, host: PeerHost, how: str) -> None:
        self._who_is_lost = f"{host.name} (rank {host.rank})"
        self._lost.set()
        if self._ended.wait(SPEAKING_SECONDS):
            return
        print(
            f"run failed: rank {self._world.rank} on {socket.gethostname()} has lost {self._who_is_lost}: "
            + (how or f"no answer for {self._timeout:g} s (--contact_timeout)")
            + ". The last complete checkpoint is kept: the same command goes on from it.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_RUN_FAILED)


def _listener(num_hosts: int) -> socket.socket:
    _allow_files(2 * num_hosts)
    return listen_everywhere(0, num_hosts)


def _allow_files(number: int) -> None:
    """Raise this process's limit of open files, 1,024 on many systems, where it is below 512 more than a number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number + 512:
        wanted = number + 512 if hard == resource.RLIM_INFINITY else min(number + 512, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _how_lost(peer: Any) -> str | None:
    """Return how a connection (a socket) that has something to say was lost: None where it was goodbye, "" where
    answers stayed out."""
    try:
        return None if peer.recv(1) else "its process there has ended, see what it says above"
    except ConnectionResetError:
        return "its process there has ended, see what it says above"
    except OSError:
        return ""


def _place() -> str:
    """Return what processes have in common that are ended together: those of a host, or of a container, under one
    launcher."""
    if is_task_of_scheduler():
        return os.environ["RANK"]
    found = [socket.gethostname()]
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        found.append(os.readlink("/proc/self/ns/net"))
    return " ".join(found)

"""All hosts of a run, asked side by side: what each says of itself, and what it finds on its way to the first one."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import TracebackType

from dialogpt_ds.doctor.facts import HostFacts, Request, facts_in
from dialogpt_ds.doctor.meeting import MEETING_MARK, MeetingPlace, Visit, visit_in
from dialogpt_ds.doctor.ssh import Ssh, SshOutcome, run_for, why_not
from dialogpt_ds.launching.hostfile import Host
from dialogpt_ds.versions import CHECKOUT

AT_ONCE = 128
"""Hosts that are asked at the same time."""
SURVEY_SECONDS = 38.0
"""For everything that the hosts are asked; a host that hangs has no answer by then, and the others' are there."""
VISIT_SECONDS, MEETING_SECONDS = 15.0, 12.0
FACTS, MEETING = "dialogpt_ds.doctor.host_facts", "dialogpt_ds.doctor.meeting"
"""Modules that the hosts run."""


@dataclass(frozen=True)
class Answer:
    """What came of asking a host."""

    facts: HostFacts | None = None
    visit: Visit | None = None
    trouble: str = ""
    """Why there are no facts."""
    way_out: str = ""
    late: bool = False
    """Whether it took too long: a cold network disk may need longer for PyTorch, so this alone is no reason to fail."""


@dataclass(frozen=True)
class Survey:
    """The hosts of a run as they were found."""

    answers: dict[str, Answer] = field(default_factory=dict)
    """By the hostfile's names, in its order; this machine alone is ""."""
    meeting: MeetingPlace | None = None

    @property
    def seen(self) -> list[tuple[str, HostFacts]]:
        """The hosts that answered."""
        return [(name, answer.facts) for name, answer in self.answers.items() if answer.facts is not None]


def ask_here(request: Request, environment: Mapping[str, str]) -> Answer:
    """Ask this machine, in a process of its own: a broken driver or library can take that one down, or hang it,
    alone."""
    done = run_for([sys.executable, "-m", FACTS, json.dumps(asdict(request))], SURVEY_SECONDS, environment)
    return _answer("localhost", done, None, SURVEY_SECONDS)


def ask_hosts(hosts: Sequence[Host], ssh: Ssh, request: Request, port: int, master_addr: str) -> Survey:
    """Ask the hosts of a hostfile."""
    names = [host.name for host in hosts]
    started = time.monotonic()
    with MeetingPoint(names[0], ssh, request, port) as meeting, ThreadPoolExecutor(min(len(names), AT_ONCE)) as pool:
        place = meeting.place
        address = master_addr or (place.address if place else "")

        def left() -> float:
            return max(started + SURVEY_SECONDS - time.monotonic(), 0.5)

        def ask(name: str) -> Answer:
            token = place.token if place else ""
            # Where the port is taken there is nobody to be reached at it.
            wanted = str(port) if place and not place.port_problem else ""
            seconds = min(VISIT_SECONDS, left())
            way = run_for(ssh.command(name, MEETING, ["visit", address, wanted, token]), seconds)
            if way.code is None or way.code >= 100:
                return _answer(name, way, None, seconds)  # nothing else would get through either
            seconds = left()
            done = run_for(ssh.command(name, FACTS, [json.dumps(asdict(request))]), seconds)
            return _answer(name, done, visit_in(way.output), seconds)

        answers = dict(zip(names, pool.map(ask, names), strict=True))
    return Survey(answers, place and MeetingPlace(**asdict(place) | {"address": address}))


def _answer(host: str, done: SshOutcome, visit: Visit | None, seconds: float) -> Answer:
    facts = facts_in(done.output) if done.code == 0 else None
    if facts is not None:
        return Answer(facts, visit)
    trouble, way_out = why_not(host, done, seconds)
    return Answer(None, visit, trouble, way_out, done.code is None)


class MeetingPoint:
    """The first host listens at the master port while the block lasts."""

    def __init__(self, first: str, ssh: Ssh, request: Request, port: int) -> None:
        words = ["hold", str(port), request.output_dir or request.folder, f".dialogpt-doctor-{uuid.uuid4().hex}"]
        self._command, self._port = ssh.command(first, MEETING, words), port
        self._process: subprocess.Popen[bytes] | None = None
        self.place: MeetingPlace | None = None
        """None: the first host can't be asked."""

    def __enter__(self) -> "MeetingPoint":
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=CHECKOUT,
            start_new_session=True,
        )
        line = _line_with(self._process, MEETING_MARK.encode(), MEETING_SECONDS)
        if line is not None:
            said = json.loads(line.partition(MEETING_MARK.encode())[2])
            if said["token_problem"]:
                said["token"] = ""
            self.place = MeetingPlace(port=self._port, **said)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process is None:
            return
        # The end of its input ends it; it removes its file then.
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _line_with(process: "subprocess.Popen[bytes]", mark: bytes, seconds: float) -> bytes | None:
    """Return the first line of a process's output with a mark in it; None where it ends, or takes longer, without
    one."""
    assert process.stdout is not None
    deadline, read = time.monotonic() + seconds, b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            return None
        chunk = os.read(process.stdout.fileno(), 65_536)
        read += chunk
        whole = read if not chunk else read.rpartition(b"\n")[0]
        found = next((line for line in whole.splitlines() if mark in line), None)
        if found is not None or not chunk:
            return found
    return None

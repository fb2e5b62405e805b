"""Two hosts made from one machine, for runs that really go over a network: own names, own addresses, own process
numbers, an sshd each.

Each host is a set of Linux namespaces (network, host name, mounts, processes, shared memory); a third network namespace
holds the switch between them. Nothing has a global name, so two sessions on one machine don't meet, and all of it is
gone with the processes, however the tests end. What real hosts would not have in common and these have: the file system
(with /dev/shm and /etc/ssh of their own), the kernel, and the cores.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dialogpt_ds.distributed.stop_requests import PR_SET_PDEATHSIG
from tests.conftest import ROOT
from tests.ranks.launch import Launched, clean_environment

NAMES = ("worker-1", "worker-2")
"""As in launch/hostfile.example, which is what the tests start their runs with."""
ADDRESSES = ("10.88.0.1", "10.88.0.2")
"""Nobody outside of the two hosts sees them."""
PROGRAMS = ("ip", "unshare", "nsenter", "mount", "sshd", "ssh", "ssh-keygen", "pdsh")
PACKAGES = "apt-get install -y iproute2 openssh-server pdsh"
NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc")
FOLDERS_OF_ROOT = "/usr/sbin:/sbin"
START_SECONDS = 20.0

BOOT = """
set -eu
hostname {name}
ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mount --bind {folder}/hosts-of-{name} /etc/hosts
mount --bind {folder}/ssh /etc/ssh
mount --bind /dev/null /etc/resolv.conf
exec {sshd} -D -E {folder}/sshd-of-{name}.log
"""
SSHD = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PrintMotd no
SetEnv {environment}
"""
SSH = """
IdentityFile /etc/ssh/key
GlobalKnownHostsFile /etc/ssh/known_hosts
UserKnownHostsFile /dev/null
StrictHostKeyChecking yes
ConnectTimeout 10
"""
EVERYWHERE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
"""What a login on either host finds in its environment, as the tests themselves do."""


def why_not() -> str | None:
    """Return what keeps this machine from being two hosts; None where nothing does."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "two hosts are made from Linux namespaces, which needs root"
    missing = [program for program in PROGRAMS if _path_of(program) is None]
    if missing:
        return f"{', '.join(missing)}: not installed ({PACKAGES})"
    trial = "ip link add name trial type bridge && ip link add name one type veth peer name other"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", trial], capture_output=True, text=True
    )
    return (
        None if tried.returncode == 0 else f"namespaces, a bridge and a link can't be made here: {tried.stderr.strip()}"
    )


def two_hosts_or_skip(folder: Path) -> Iterator["TwoHosts"]:
    """Yield the two hosts to a fixture; skips the test, with the reason, where they can't be made."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with TwoHosts(folder) as hosts:
        yield hosts


class Host:
    """One of them, while its first process, the sshd, lives."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address = name, address
        self._folder = folder
        boot = BOOT.format(name=name, folder=folder, sshd=_path_of("sshd"))
        self._started = _start(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", boot], folder
        )
        try:
            _wait_for(
                lambda: psutil.Process(self._started.pid).children(),
                f"{name} doesn't start:",
                more=(folder / "hosts.log").read_text,
            )
        except BaseException:
            self._started.kill()
            raise
        self.init = psutil.Process(self._started.pid).children()[0]
        self._network = os.stat(f"/proc/{self.init.pid}/ns/net").st_ino

    def inside(self, command: list[str]) -> list[str]:
        """Return a command that runs another on this host, in the checkout, as leader of a session as from a terminal
        of its own."""
        enter = ["nsenter", "--target", str(self.init.pid), *NAMESPACES]
        return [*enter, "env", f"--chdir={ROOT}", "setsid", *command]

    def launch(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> Launched:
        """Start a command on this host in the background, with no .deepspeed_env where its environment doesn't name
        one."""
        return Launched(self.inside(command), log, {"DS_ENV_FILE": str(self._folder / "none")} | (environment or {}))

    def run(self, command: list[str], timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a short command on this host to its end."""
        return subprocess.run(
            self.inside(command), capture_output=True, text=True, timeout=timeout, env=clean_environment()
        )

    def processes(self) -> list[psutil.Process]:
        """Return everything that runs on this host, the sshd and its sessions excepted: those may wait for a network
        that is cut."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                here = os.stat(f"/proc/{process.pid}/ns/net").st_ino == self._network
                if here and process.name() not in ("sshd", "unshare") and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Return the training processes on this host."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                parent = process.parent()
                if "RANK" in process.environ() and parent is not None and "RANK" not in parent.environ():
                    found.append(process)
        return found

    def kill_ranks(self) -> None:
        """Kill the training processes on this host with SIGKILL."""
        ranks = self.ranks()
        assert ranks, f"no rank runs on {self.name}"
        for process in ranks:
            process.kill()

    def kill_all(self) -> None:
        """Kill everything on this host but its sshd."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def wait_until_quiet(self, timeout: float) -> None:
        """Wait until nothing runs on this host; fails where time runs out."""
        _wait_for(
            lambda: not self.processes(), f"still running on {self.name}:", timeout, lambda: str(self.processes())
        )

    def shut_down(self) -> None:
        """End the host with all that runs on it."""
        self.init.kill()
        self._started.wait()


class TwoHosts:
    """Both hosts and the network between them, while it is entered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hosts: list[Host] = []
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "TwoHosts":
        try:
            self._write_files()
            self._switch = _start(["unshare", "--net", "sleep", "infinity"], self._folder)
            _wait_for(lambda: _network_of(self._switch_pid) != _network_of(os.getpid()), "the switch doesn't start")
            self._at_switch("link", "add", "name", "switch", "type", "bridge")
            self._at_switch("link", "set", "switch", "up")
            for name, address in zip(NAMES, ADDRESSES, strict=True):
                self._hosts.append(Host(name, address, self._folder))
                self._connect(self._hosts[-1])
            for name in NAMES:
                self._wait_for_ssh(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            host.shut_down()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    @property
    def first(self) -> Host:
        """The host that has rank 0, and on which the tests start their runs."""
        return self._hosts[0]

    @property
    def second(self) -> Host:
        """The other."""
        return self._hosts[1]

    def cut(self) -> None:
        """Take the second host off the network. No interface of either goes down: packets vanish, which is the hardest
        case to notice."""
        self._at_switch("link", "set", f"port-{self.second.name}", "nomaster")

    def join(self) -> None:
        """Put the second host back on the network."""
        self._at_switch("link", "set", f"port-{self.second.name}", "master", "switch")

    def wait_until_quiet(self, timeout: float) -> None:
        """Wait until nothing runs on either host; fails where time runs out on one of them."""
        for host in self._hosts:
            host.wait_until_quiet(timeout)

    def tidy(self) -> None:
        """Put the hosts back into the state that they started in."""
        for host in self._hosts:
            host.kill_all()
        self.join()
        self.wait_until_quiet(10)

    def _wait_for_ssh(self, name: str) -> None:
        words = (self._folder / "hosts.log").read_text
        _wait_for(
            lambda: self.first.run(["ssh", name, "true"]).returncode == 0, f"ssh {name} doesn't work:", more=words
        )

    @property
    def _switch_pid(self) -> int:
        assert self._switch is not None
        return self._switch.pid

    def _at_switch(self, *command: str) -> None:
        _do(["nsenter", "--target", str(self._switch_pid), "--net", "ip", *command])

    def _connect(self, host: Host) -> None:
        port, pid = f"port-{host.name}", str(host.init.pid)
        _do(
            [
                "ip",
                "link",
                "add",
                "name",
                port,
                "netns",
                str(self._switch_pid),
                "type",
                "veth",
                "peer",
                "name",
                "e0",
                "netns",
                pid,
            ]
        )
        self._at_switch("link", "set", port, "master", "switch", "up")
        for command in (["addr", "add", f"{host.address}/24", "dev", "e0"], ["link", "set", "e0", "up"]):
            _do(["nsenter", "--target", pid, "--net", "ip", *command])

    def _write_files(self) -> None:
        """Write keys, ssh's configuration, and each host's /etc/hosts."""
        ssh = self._folder / "ssh"
        ssh.mkdir(mode=0o755, parents=True)
        for key in ("key", "host_key"):
            _do(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(ssh / key)])
        environment = EVERYWHERE | {"HOME": str(Path.home())}
        (ssh / "sshd_config").write_text(
            SSHD.format(environment=" ".join(f"{name}={value}" for name, value in environment.items()))
        )
        (ssh / "ssh_config").write_text(SSH)
        (ssh / "known_hosts").write_text(f"{','.join(NAMES + ADDRESSES)} {(ssh / 'host_key.pub').read_text()}")
        for own in NAMES:
            # As Debian writes it: a host's own name is an address that nobody else can reach.
            lines = ["127.0.0.1 localhost"]
            lines += [
                f"{'127.0.1.1' if name == own else address} {name}"
                for name, address in zip(NAMES, ADDRESSES, strict=True)
            ]
            (self._folder / f"hosts-of-{own}").write_text("\n".join(lines) + "\n")


def _path_of(program: str) -> str | None:
    """Return where a program is, also one for administrators, which not every PATH has."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), FOLDERS_OF_ROOT]))


def _network_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/net").st_ino


def _end_with_tests() -> None:
    """In a child, between fork and exec: end when the process of the tests ends, however it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with open(folder / "hosts.log", "ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_end_with_tests)


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _wait_for(
    what: Callable[[], object], otherwise: str, timeout: float = START_SECONDS, more: Callable[[], str] = str
) -> None:
    """Wait until something is so; fails where time runs out before that."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, f"{otherwise} {more()}"
        time.sleep(0.02)

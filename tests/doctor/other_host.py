"""A second host for the doctor: this machine once more, with an ssh server and file systems of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.ranks.launch import clean_environment

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
SERVER = """
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PrintMotd no
PidFile none
"""
CLIENT = """
IdentityFile {folder}/key
GlobalKnownHostsFile {folder}/known_hosts
UserKnownHostsFile /dev/null
StrictHostKeyChecking yes
LogLevel ERROR
"""


@dataclass
class Keys:
    """Keys and settings of ssh for a test, apart from those of whoever runs it."""

    folder: Path
    port: int

    def environment(self) -> dict[str, str]:
        """Return what makes the doctor use them."""
        return {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@dataclass
class OtherHost:
    """An ssh server on 127.0.0.1 in a mount namespace, so that what is mounted there is seen there alone."""

    keys: Keys
    process: "subprocess.Popen[bytes] | None" = None

    def start(self, *mounts: str) -> None:
        """Start it anew, after these shell commands."""
        self.stop()
        script = "; ".join(
            ["set -e", "mkdir -p /run/sshd", *mounts, f"exec {SSHD} -D -e -f {self.keys.folder}/sshd_config"]
        )
        with open(self.keys.folder / "sshd.log", "wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", script],
                stderr=log,
                stdout=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + 20.0
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.keys.port), timeout=1.0).close()
                return
            except OSError:
                said = (self.keys.folder / "sshd.log").read_text(errors="replace")
                assert self.process.poll() is None, f"the ssh server has ended: {said}"
                assert time.monotonic() < deadline, f"the ssh server does not answer: {said}"
                time.sleep(0.05)

    def stop(self) -> None:
        """End it, and all that came in over it."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@dataclass(frozen=True)
class Examined:
    """A finished run of the doctor."""

    code: int
    lines: list[str]
    errors: str

    @property
    def output(self) -> str:
        """All that it printed."""
        return "\n".join(self.lines)

    def found(self, level: str, check: str) -> str:
        """Return the lines of a check at a level, with what stands below each."""
        texts, inside = [], False
        for line in self.lines:
            if not line.startswith(" "):
                inside = line.startswith(f"{level:<8} {check:<12} ")
            if inside:
                texts.append(line.strip())
        return "\n".join(texts)


def examine(*words: str, folder: Path = ROOT, **environment: str) -> Examined:
    """Run the command as a user does, in a folder, with changes to the environment."""
    nobodys = {"DS_ENV_FILE": "not-that-of-whoever-runs-the-tests"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "doctor.py"), *words],
        cwd=folder, env=clean_environment() | nobodys | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return Examined(done.returncode, done.stdout.splitlines(), done.stderr)

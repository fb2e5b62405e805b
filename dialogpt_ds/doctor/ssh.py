"""Commands on other hosts by ssh, as the launcher gives them: without a password, in the same folder, with the same
Python."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from dialogpt_ds.versions import CHECKOUT

SSH_SECONDS = 8
NO_FOLDER, NO_PYTHON, NO_DOCTOR = 101, 102, 103
"""Exit codes of the command on the other host, for what it did not find; ssh's own is 255."""
SSH_FAILED = 255
_ADDRESS = r"\b\d+\.\d+\.\d+\.\d+\b"
APPEND = "PDSH_SSH_ARGS_APPEND"
"""Variable with options that pdsh gives to ssh."""

_REASONS = (
    (
        r"host key verification failed|host identification has changed",
        "its host key is not known here, or is another one now",
        "ssh HOST once and answer yes (after a change: ssh-keygen -R HOST first)",
    ),
    (
        r"permission denied|too many authentication failures",
        "it wants a password, or knows no key of this user",
        "ssh-copy-id HOST (after ssh-keygen, where there is no key yet); ssh -o BatchMode=yes HOST true must work",
    ),
    (
        r"could not resolve hostname",
        "its name is not known here",
        "correct the name in the hostfile, or give it an address in /etc/hosts or as HostName in ~/.ssh/config",
    ),
    (
        r"connection refused",
        "nothing listens at its ssh port",
        "start its ssh server (Debian: apt-get install openssh-server), or give the right port: --ssh_port, also to "
        "deepspeed",
    ),
    (
        r"timed out|no route to host|network is unreachable|connection reset|connection closed",
        "it can't be reached",
        "is it up, and does a firewall between the hosts let ssh through?",
    ),
)
"""What ssh says, what that means, and the way out."""
HOST = "HOST"
"""Stands for the host's name, so that many hosts with the same trouble are one line."""


@dataclass(frozen=True)
class Ssh:
    """How hosts are reached."""

    port: int | None = None
    exports: Mapping[str, str] = field(default_factory=dict)
    """Variables that the launcher gives to the processes there."""

    def options(self) -> list[str]:
        """Return the options that hold for the launcher's connections too."""
        port = ["-p", str(self.port)] if self.port is not None else []
        return [*port, *shlex.split(os.environ.get(APPEND, ""))]

    def command(self, host: str, module: str, words: list[str]) -> list[str]:
        """Return the command that runs a module of this package on another host."""
        # `exec sh` for those whose login shell is another kind; $1 is the folder, $2 the Python.
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in self.exports.items())
        script = (
            f'{exports}cd "$1" 2>/dev/null || exit {NO_FOLDER}; test -x "$2" || exit {NO_PYTHON}; '
            f'test -f dialogpt_ds/doctor/host_facts.py || exit {NO_DOCTOR}; python=$2; shift 2; exec "$python" -m "$@"'
        )
        quoted = " ".join(shlex.quote(word) for word in [script, "sh", str(CHECKOUT), sys.executable, module, *words])
        batch = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}"]
        return ["ssh", *batch, *self.options(), host, f"exec sh -c {quoted}"]

    def effective(self, host: str) -> dict[str, str]:
        """Return ssh's settings for a host by name in small letters, from all of its files and options; nothing where
        it can't say."""
        try:
            done = subprocess.run(
                ["ssh", "-G", *self.options(), host],
                capture_output=True,
                text=True,
                timeout=5.0,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.SubprocessError):
            return {}
        return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


@dataclass(frozen=True)
class SshOutcome:
    """How a command ended."""

    code: int | None
    """None: it took too long and was ended."""
    output: str
    errors: str


def run_for(command: list[str], seconds: float, environment: Mapping[str, str] | None = None) -> SshOutcome:
    """Run a command for at most so long; everything that it has started ends with it."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, cwd=CHECKOUT, env=environment,
        )  # fmt: skip
    except OSError as error:
        return SshOutcome(127, "", f"{command[0]}: {error.strerror}")
    with process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return SshOutcome(None, "", "")
    return SshOutcome(process.returncode, output, errors)


def why_not(host: str, done: SshOutcome, seconds: float) -> tuple[str, str]:
    """Return why a host gave no answer, and the way out, with HOST in the place of its name."""
    if done.code is None:
        return (
            f"no answer within {seconds:.3g} s",
            "is it overloaded, or does a network disk hang there? ssh HOST nproc",
        )
    if done.code == NO_FOLDER:
        return (
            f"there is no folder {CHECKOUT} on it",
            "put the checkout at the same path on every host, or on a disk that they share",
        )
    if done.code == NO_PYTHON:
        return (
            f"there is no Python {sys.executable} on it",
            "install the same environment at the same path on every host, or on a disk that they share",
        )
    if done.code == NO_DOCTOR:
        return f"{CHECKOUT} on it holds no code with this doctor", "bring the same checkout there (git clone, rsync)"
    said = [line.strip() for line in done.errors.splitlines() if line.strip()]
    quoted = f" ({_without_name(said[-1], host)[:200]})" if said else ""
    if done.code == SSH_FAILED:
        for pattern, meaning, way_out in _REASONS:
            if re.search(pattern, done.errors, re.IGNORECASE):
                return f"ssh: {meaning}{quoted}", way_out
        return f"ssh failed{quoted}", "look at: ssh -v -o BatchMode=yes HOST true"
    return (
        f"its Python ended with {done.code}{quoted}",
        f"look at, on that host: {sys.executable} -c 'import torch, deepspeed'",
    )


def _without_name(text: str, host: str) -> str:
    """Return what ssh says with HOST in the place of a host's name and of addresses."""
    name = re.escape(host.rpartition("@")[2])
    return re.sub(rf"(?<![\w.-]){name}(?![\w-])|{_ADDRESS}", HOST, text)

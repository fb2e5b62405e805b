"""Fixtures of the doctor's tests."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dialogpt_ds.distributed.world import free_port
from tests.conftest import ROOT
from tests.doctor.other_host import CLIENT, SERVER, SSHD, Keys, OtherHost


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Skips where there is no ssh."""
    if shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("ssh is not installed (Debian: apt-get install openssh-client)")
    folder, port = tmp_path_factory.mktemp("ssh"), free_port()
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True, timeout=30)
    public = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
    (folder / "sshd_config").write_text(SERVER.format(folder=folder, port=port))
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    return Keys(folder, port)


@pytest.fixture
def other_host(keys: Keys) -> Iterator[OtherHost]:
    """Skips where it can't be made."""
    if os.geteuid() != 0:
        pytest.skip("an ssh server with file systems of its own needs root")
    if not os.path.exists(SSHD) or shutil.which("unshare") is None:
        pytest.skip("no ssh server is installed (Debian: apt-get install openssh-server)")
    host = OtherHost(keys)
    yield host
    host.stop()


@pytest.fixture(scope="session")
def other_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout that is no git checkout, with one line more in one file."""
    folder = tmp_path_factory.mktemp("other") / "checkout"
    for name in ("dialogpt_ds", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "dialogpt_ds" / "errors.py").open("a", encoding="utf-8") as file:
        file.write("# another state of the code\n")
    return folder

"""The example of a host file, and the reasons for which a machine can't be two hosts: what needs neither root nor
sshd."""

import os
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hosts.two_hosts import NAMES, PACKAGES, why_not


def test_deepspeed_reads_the_example() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(ROOT / "launch" / "hostfile.example")) == dict.fromkeys(NAMES, 8)


def test_the_reason_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in str(why_not())


def test_the_reason_without_the_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("tests.hosts.two_hosts.FOLDERS_OF_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = str(why_not())
    assert "sshd" in reason
    assert "pdsh" in reason
    assert PACKAGES in reason

"""The doctor over two hosts with a network between them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.doctor.other_host import Examined
from tests.hosts.two_hosts import ADDRESSES, TwoHosts, two_hosts_or_skip

pytestmark = pytest.mark.multinode

CPU = (
    "--deepspeed_config",
    "ds_configs/cpu_fp32.json",
    "--wandb_mode",
    "disabled",
    "--model",
    "tiny",
    "--num_gpus",
    "1",
)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Skips, with the reason, where they can't be made."""
    yield from two_hosts_or_skip(tmp_path_factory.mktemp("hosts"))


def examine(hosts: TwoHosts, output: Path, *words: str) -> Examined:
    """Run the doctor on the first host, for a run over both."""
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--hostfile", "launch/hostfile.example", *CPU]
    done: subprocess.CompletedProcess[str] = hosts.first.run(
        [*command, "--output_dir", str(output), *words], timeout=120
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return Examined(done.returncode, done.stdout.splitlines(), done.stderr)


def test_two_hosts_that_are_as_they_should_be(hosts: TwoHosts, tmp_path: Path) -> None:
    run = examine(hosts, tmp_path / "run")
    assert run.code == 0, run.output
    assert "2 hosts answer without a password" in run.found("ok", "ssh")
    way = run.found("ok", "network")
    assert f"{ADDRESSES[0]}:29500 on worker-1 can be reached; by worker-1: " in way
    assert f"worker-2: e0 ({ADDRESSES[1]})" in way
    assert "launch/train.py names the right interface to it (GLOO_SOCKET_IFNAME)" in run.found("ok", "host name")
    assert "all hosts see what worker-1 writes there" in run.found("ok", "output_dir")
    assert "way out: export PDSH_SSH_ARGS_APPEND='-o ServerAliveInterval=15'" in run.found("warning", "keep-alive")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_shared_a_route_that_leads_nowhere_and_a_host_that_is_cut_off(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    assert hosts.second.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]).returncode == 0
    # An address of the first host that the second one has no way to: the wrong one of two networks.
    run = examine(hosts, tmp_path, "--master_addr", "10.99.0.1")
    assert run.code == 1, run.output
    assert f"worker-2: what worker-1 writes to {tmp_path} is not seen" in run.found("problem", "output_dir")
    assert "10.99.0.1:29500 on worker-1 can't be reached" in run.found("problem", "network")
    assert "--master_addr ADDRESS" in run.found("problem", "network")
    hosts.cut()
    run = examine(hosts, tmp_path)
    hosts.join()
    assert run.code == 1, run.output
    assert "worker-2: ssh: it can't be reached" in run.found("problem", "ssh")
    assert "is it up, and does a firewall between the hosts let ssh through?" in run.found("problem", "ssh")

"""Processes that wait for each other at the start."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dialogpt_ds.distributed.rendezvous import interface_towards, name_interface
from tests.ranks.launch import Launched, python

WAITING = """
import time
from dialogpt_ds.distributed import rendezvous as meeting
meeting.FIRST_WORD_SECONDS = meeting.SECONDS_BETWEEN_WORDS = 0.2
meeting.RENDEZVOUS_SECONDS = {most}
with meeting.RendezvousWatch({rank}, {size}, {speaks}):
    time.sleep({seconds})
print("met")
"""


def wait_in_a_process(**what: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MASTER_ADDR": "node07", "MASTER_PORT": "29500"}
    words = [sys.executable, "-c", WAITING.format(**what)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, check=False)


def test_a_wait_that_is_long_is_said_and_ends() -> None:
    done = wait_in_a_process(rank=0, size=2, speaks=True, seconds=30, most=0.5)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert said[0].startswith(
        f"rank 0 on {socket.gethostname()} waits at node07:29500 for the other processes, 2 in all (0 of 0 s)."
    )
    assert said[-1].startswith("run failed: rank 0")
    assert "launch/doctor.py --hostfile HOSTS" in said[-1]


def test_ranks_beside_the_first_of_a_host_speak_only_at_the_end() -> None:
    done = wait_in_a_process(rank=3, size=4, speaks=False, seconds=30, most=0.7)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("size", [1, 2])
def test_a_meeting_in_time_says_nothing(size: int) -> None:
    done = wait_in_a_process(
        rank=0, size=size, speaks=True, seconds=0 if size == 2 else 0.5, most=0.3 if size == 1 else 60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "met\n", "")


def test_the_interface_towards_this_host_is_no_loopback() -> None:
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("no.such.host.invalid") is None
    own = [
        (name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    if not own:
        pytest.skip("this machine has no address but the loopback's")
    assert interface_towards(own[0][1]) == own[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "ib0"}),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=eth1"}),
    ],
)
def test_gloo_and_nccl_are_told_the_same_interface(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], told: dict[str, str]
) -> None:
    from dialogpt_ds.distributed import rendezvous as meeting

    monkeypatch.setattr(
        meeting, "interface_towards", lambda address: ("eth1", "10.0.0.7") if address == "node07" else None
    )
    monkeypatch.setattr(os, "environ", {"MASTER_ADDR": "node07"} | given)
    name_interface()
    assert os.environ == {"MASTER_ADDR": "node07"} | told


def test_an_interface_that_a_person_named_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    name_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "one host: gloo's own choice"


def test_a_port_that_is_taken_is_said(small_world: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        options = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
                   "--output_dir", str(tmp_path / "out"), "--fp16", "False"]  # fmt: skip
        with Launched(python() + options, tmp_path / "log", environment) as run:
            assert run.wait() == 1
        assert f"run failed: port {port}, where this run's processes meet, is taken on this host" in run.output
        assert "Traceback" not in run.output


def test_what_nccl_says_is_not_taken_for_a_network_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from dialogpt_ds.distributed.world import _why_apart

    monkeypatch.setenv("MASTER_ADDR", "node07")
    monkeypatch.setenv("MASTER_PORT", "29500")
    said = _why_apart(
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:77, invalid usage\nLast error:\nDuplicate GPU detected")
    )
    assert said.startswith(
        "the processes met at node07:29500, but their GPUs could not be connected (NCCL): Duplicate GPU detected."
    )
    other = _why_apart(RuntimeError("Gloo connectFullMesh failed"))
    assert other.startswith("the processes did not come together at node07:29500")

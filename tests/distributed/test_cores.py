"""The host's cores are shared among the ranks that compute there, with DeepSpeed's real Adam for the host."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dialogpt_ds.distributed import world as module
from dialogpt_ds.distributed.world import World, free_port, prepare_cpu
from tests.conftest import ROOT
from tests.ranks.launch import BIN, clean_environment

SCRIPT = str(ROOT / "tests" / "ranks" / "cpu_adam_threads.py")
SYSTEMS_LIBRARY = Path("/usr/lib/x86_64-linux-gnu/libgomp.so.1")
TOLD = "OMP_NUM_THREADS: 6 for each process here, its share of the cores, and not torchrun's 1"


def started(command: list[str], **variables: str) -> tuple[list[dict[str, object]], str]:
    """Run a command without OMP_NUM_THREADS but for what is given; returns what its processes print, and stderr."""
    environment = {name: value for name, value in clean_environment().items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


def rank(**variables: str) -> dict[str, str]:
    return {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "1"} | variables


def test_an_offloaded_optimizer_has_its_ranks_share_of_the_cores() -> None:
    assert started([sys.executable, SCRIPT], **rank())[0] == [{"torch": 3, "libraries": [3]}]


@pytest.mark.skipif(
    not SYSTEMS_LIBRARY.exists(), reason="needs another copy of GNU's OpenMP library (Debian: libgomp1)"
)
def test_a_copy_of_openmps_library_that_comes_later_has_it_too() -> None:
    assert started([sys.executable, SCRIPT, str(SYSTEMS_LIBRARY)], **rank())[0] == [{"torch": 3, "libraries": [3, 3]}]


def test_a_number_that_somebody_set_is_kept() -> None:
    assert started([sys.executable, SCRIPT], **rank(OMP_NUM_THREADS="2"))[0] == [{"torch": 2, "libraries": [2]}]


def test_torchruns_single_thread_is_replaced_and_said_once() -> None:
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), SCRIPT]
    printed, errors = started(torchrun)
    assert printed == [{"torch": 6, "libraries": [6]}] * 2
    assert errors.count(TOLD) == 1
    printed, errors = started(torchrun, OMP_NUM_THREADS="1")
    assert printed == [{"torch": 1, "libraries": [1]}] * 2, "somebody wants one"
    assert TOLD not in errors


@pytest.mark.parametrize(
    ("device", "offloads", "shared"), [("cuda", False, False), ("cuda", True, True), ("cpu", False, True)]
)
def test_cores_are_shared_on_cpus_and_with_offload_alone(
    device: str, offloads: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(module, "share_cores", lambda ranks: calls.append(ranks) or "")
    monkeypatch.setenv("DS_ACCELERATOR", device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: None)
    prepare_cpu(World(0, 8, 0), offloads)
    assert calls == [4] * shared

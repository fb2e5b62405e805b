"""Hosts that watch each other. Links that are cut are in tests/multinode."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dialogpt_ds.distributed.world import free_port
from tests.conftest import ROOT
from tests.ranks.launch import clean_environment

RANK = str(ROOT / "tests" / "ranks" / "contact_rank.py")


def two_hosts(how: str, tmp_path: Path, srun: bool = False) -> list[tuple[int, str]]:
    """Return exit code and output of rank 0 and of rank 1."""
    port, started = free_port(), []
    for rank in (0, 1):
        environment = clean_environment() | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        if srun:  # both tasks on one host
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                del environment[name]
            environment |= {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(rank)}
        with open(tmp_path / f"log-{rank}", "wb") as log:
            started.append(
                subprocess.Popen([sys.executable, RANK, "0.5", how], stdout=log, stderr=log, env=environment)
            )
    try:
        codes = [process.wait(timeout=50) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(code, (tmp_path / f"log-{rank}").read_text()) for rank, code in enumerate(codes)]


def test_hosts_that_part_in_order_say_nothing(tmp_path: Path) -> None:
    for code, said in two_hosts("leave", tmp_path):
        assert (code, said) == (0, "notes []\nparted\n")


def test_a_stranger_that_says_nothing_and_a_host_that_is_late_leave_the_run_alone(tmp_path: Path) -> None:
    (first, said), (second, _) = two_hosts("stranger", tmp_path)
    assert (first, second) == (0, 0)
    assert "warning: no line to 1 of the other hosts, so that only --hang_timeout notices when they are lost" in said
    assert "(rank 1): not seen by rank 0 in time" in said
    assert said.endswith("parted\n")


@pytest.mark.parametrize("srun", [False, True], ids=["hosts", "tasks of srun on one host"])
def test_a_process_that_died_elsewhere_is_noticed_at_once(srun: bool, tmp_path: Path) -> None:
    started = time.monotonic()
    (code, said), _ = two_hosts("die", tmp_path, srun)
    assert code == 1
    assert "run failed: rank 0 on " in said
    assert "(rank 1): its process there has ended" in said
    assert "parted" not in said
    assert time.monotonic() - started < 45, "the collective would have waited for 60 s"

"""Locks of torch's extension builder that killed processes have left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dialogpt_ds.distributed import op_locks
from dialogpt_ds.distributed.op_locks import release_stale_locks

HOLDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    return folder / "lock"


def aged(lock: Path, seconds: float) -> Path:
    then = time.time() - seconds
    os.utime(lock, (then, then))
    return lock


def test_the_lock_of_a_process_at_work_stays_and_that_of_a_killed_one_goes(lock: Path, tmp_path: Path) -> None:
    """With torch's own lock."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            aged(lock, 3_600)
            assert release_stale_locks(tmp_path) == []
            assert lock.exists()
        finally:
            holder.send_signal(signal.SIGKILL)
    assert lock.exists(), "torch would wait for ever now"
    assert release_stale_locks(tmp_path) == [lock]
    assert not lock.exists()
    assert release_stale_locks(tmp_path) == []


@pytest.mark.parametrize(("all_seen", "on_network"), [(False, False), (True, True)])
def test_where_others_are_not_seen_a_lock_must_be_old(
    all_seen: bool, on_network: bool, lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op_locks, "_all_are_seen", lambda: all_seen)
    monkeypatch.setattr(op_locks, "_is_on_network", lambda _: on_network)
    lock.touch()
    aged(lock, 300)
    assert release_stale_locks(tmp_path) == []
    aged(lock, 700)
    assert release_stale_locks(tmp_path) == [lock]


def test_a_lock_of_this_moment_is_left_alone(lock: Path, tmp_path: Path) -> None:
    lock.touch()
    assert release_stale_locks(tmp_path) == []

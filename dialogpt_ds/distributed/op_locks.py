"""Locks of torch's extension builder that a killed process has left behind: whatever loads that operation next waits
for ever."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

LOCAL_SECONDS, REMOTE_SECONDS = 5.0, 600.0
"""Age at which a lock that nobody here has open is taken for left behind: where all that could hold it are seen, and
where not."""
FIRST_PID_NAMESPACE = 4_026_531_836
"""Inode of Linux's initial process namespace (PROC_PID_INIT_INO of proc_ns.h); in another one, as in a container,
others are not seen."""
NETWORK_FILES = ("nfs", "lustre", "cifs", "smb", "beegfs", "gpfs", "ceph", "fuse", "9p", "afs", "glusterfs")
"""Beginnings of the names of file systems that other hosts write to."""
WAIT_SECONDS = 30.0


def release_stale_locks(root: Path | None = None) -> list[Path]:
    """Remove the locks that nobody holds; returns them.

    torch makes a file of the name lock in an operation's folder for as long as it builds or loads it, and keeps it open
    meanwhile (torch.utils.file_baton). A process that is killed then leaves the file, and every later one waits until
    it is gone.

    Args:
        root: folder of the operations' folders; torch's own by default.
    """
    root = _torch_root() if root is None else root
    if not any(_locks(root)):
        return []
    removed = []
    try:
        # One at a time, or a rank could remove the lock that another has taken after removing the old one.
        with FileLock(Path(tempfile.gettempdir(), f"dialogpt-ds-op-locks-{os.getuid()}"), timeout=WAIT_SECONDS):
            for lock in _locks(root):
                if _is_stale(lock):
                    lock.unlink(missing_ok=True)
                    removed.append(lock)
    except (OSError, Timeout):
        pass  # another user's, or a file system without locks: torch waits as it always did
    return removed


def _torch_root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _locks(root: Path) -> Iterator[Path]:
    # Below TORCH_EXTENSIONS_DIR the operations come at once, else below a folder for Python and CUDA.
    yield from root.glob("*/lock")
    yield from root.glob("*/*/lock")


def _is_stale(lock: Path) -> bool:
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return False
    limit = LOCAL_SECONDS if _all_are_seen() and not _is_on_network(lock) else REMOTE_SECONDS
    return age > limit and not any(_has_open(process, lock) for process in psutil.process_iter())


def _has_open(process: psutil.Process, file: Path) -> bool:
    try:
        return any(opened.path == str(file) for opened in process.open_files())
    except (psutil.Error, OSError):
        return False


def _all_are_seen() -> bool:
    try:
        return os.stat("/proc/self/ns/pid").st_ino == FIRST_PID_NAMESPACE
    except OSError:
        return False


def _is_on_network(file: Path) -> bool:
    mounts = [mount for mount in psutil.disk_partitions(all=True) if file.is_relative_to(mount.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is None or nearest.fstype.startswith(NETWORK_FILES)

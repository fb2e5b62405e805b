"""A folder whose file system makes files and folders in it but renames and deletes none, as a mounted bucket."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def append_only(folder: Path) -> Iterator[Path]:
    """Make a folder and let entries only be added to it (chattr +a); skips the test where that is not possible."""
    folder.mkdir()
    try:
        done = subprocess.run(["chattr", "+a", str(folder)], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("there is no chattr here (Debian: apt-get install e2fsprogs)")
    if done.returncode:
        pytest.skip(f"no folder can be made append-only here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["chattr", "-a", str(folder)], check=True, timeout=30)

"""The code that runs here: versions, revision and checksum, by which two hosts are compared."""

import hashlib
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "wandb", "jsonargparse")
PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent
"""Where the code lies, if it was not installed from a wheel."""
IMAGE_REVISION = "DIALOGPT_REVISION"
"""Variable in which the Dockerfile leaves the commit; .git is not in the image."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that training depends on most."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@lru_cache
def code_sha256() -> str:
    """Return the checksum over names and contents of this package's files, the same in a checkout and in a wheel."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


def git_revision(checkout: Path = CHECKOUT) -> dict[str, Any] | None:
    """Return commit and whether files differ from it; in an image the commit that it was built from; None where neither
    is known."""
    if not (checkout / ".git").exists():
        built_from = os.environ.get(IMAGE_REVISION, "unknown")
        return None if built_from == "unknown" else {"commit": built_from, "changed": False}
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}

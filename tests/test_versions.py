"""The code that runs, as hosts compare it."""

import subprocess
from pathlib import Path

import pytest

from dialogpt_ds.versions import IMAGE_REVISION, code_sha256, git_revision, versions


def test_the_revision_is_that_of_the_checkout_and_says_whether_files_differ(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")
    assert git_revision(tmp_path) == {"commit": commit, "changed": False}
    (tmp_path / "file").write_text("b")
    assert git_revision(tmp_path) == {"commit": commit, "changed": True}


def test_an_image_knows_the_commit_that_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_revision(tmp_path) is None
    monkeypatch.setenv(IMAGE_REVISION, "unknown")
    assert git_revision(tmp_path) is None
    monkeypatch.setenv(IMAGE_REVISION, "abc123")
    assert git_revision(tmp_path) == {"commit": "abc123", "changed": False}


def test_versions_and_checksum_name_what_is_installed() -> None:
    import torch

    assert versions()["torch"] == torch.__version__
    assert versions().keys() >= {"python", "deepspeed", "transformers"}
    assert len(code_sha256()) == 64

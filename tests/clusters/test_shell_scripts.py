"""Every shell script of the repository, as shellcheck sees it."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.ranks.launch import BIN

SCRIPTS = sorted(
    {
        path
        for pattern in ("launch/*.sh", "launch/*.sbatch", "tests/*.sh", "tests/*/*.sh", ".ci/run")
        for path in ROOT.glob(pattern)
    }
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(
        [str(BIN / "shellcheck"), "--external-sources", str(script)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_shellcheck_would_find_something(tmp_path: Path) -> None:
    script = tmp_path / "wrong.sh"
    script.write_text("#!/usr/bin/env bash\nrm -r $1\n")
    done = subprocess.run([str(BIN / "shellcheck"), str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "SC2086" in done.stdout
    assert {"slurm.sbatch", "demo.sh", "run.sh", "run"} <= {path.name for path in SCRIPTS}

"""What the deepspeed launcher above a process was told."""

from pathlib import Path

import pytest

from dialogpt_ds.launching.launcher import hostfile_of
from tests.helpers.launch import deepspeed, run

DEEPSPEED = "/venv/bin/deepspeed"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["python", DEEPSPEED, "--hostfile", "hosts", "train.py"], "hosts"),
        (["python", DEEPSPEED, "--hostfile=/a/hosts", "train.py"], "/a/hosts"),
        ([DEEPSPEED, "-H", "hosts", "--master_port", "29501", "train.py", "--hang_timeout", "5"], "hosts"),
        (["python", "-m", "deepspeed.launcher.runner", "-Hhosts", "--module", "dialogpt_ds"], "hosts"),
        (["python", DEEPSPEED, "--num_gpus", "2", "train.py"], None),
        (["grep", "--hostfile", "hosts", "notes"], None),
        (["torchrun", "--nproc_per_node", "2", "train.py", "--hostfile", "hosts"], None),
        ([], None),
    ],
)
def test_the_host_file_of_a_command_line(words: list[str], named: str | None) -> None:
    assert hostfile_of(words) == named


def test_a_host_file_that_is_named_and_missing_does_not_train_here_alone(small_world: tuple[Path, Path], tmp_path: Path) -> None:
    command = deepspeed(1)
    command[1:1] = ["--hostfile", "no_such_hosts"]
    done = run([*command, "--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
                "--output_dir", str(tmp_path / "out")])  # fmt: skip
    assert done.returncode == 2
    assert "error: the deepspeed command names --hostfile no_such_hosts, which does not exist (looked in " in done.stderr
    assert not (tmp_path / "out").exists()

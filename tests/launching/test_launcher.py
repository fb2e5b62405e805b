"""What the deepspeed launcher above a process was told."""

import socket
import subprocess
from pathlib import Path

import pytest

from dialogpt_ds.launching.launcher import chosen_hosts, hostfile_of, is_this_machine, runner_at
from tests.ranks.launch import deepspeed, run

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


def with_hostfile(hostfile: str, small_world: tuple[Path, Path], output: Path) -> subprocess.CompletedProcess[str]:
    command = deepspeed(1)
    command[1:1] = ["--hostfile", hostfile, "--no_ssh_check", "--master_addr", "127.0.0.1"]
    return run([*command, "--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"),
                "--skip_eval", "--output_dir", str(output)])  # fmt: skip


def test_a_host_file_that_is_named_and_missing_does_not_train_here_alone(
    small_world: tuple[Path, Path], tmp_path: Path
) -> None:
    done = with_hostfile("no_such_hosts", small_world, tmp_path / "out")
    assert done.returncode == 2
    assert (
        "error: the deepspeed command names --hostfile no_such_hosts, which does not exist (looked in " in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_a_host_file_with_another_host_alone_does_not_train_here(
    small_world: tuple[Path, Path], tmp_path: Path
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("192.0.2.7 slots=1\n")  # an address of nobody's (RFC 5737)
    done = with_hostfile(str(hostfile), small_world, tmp_path / "out")
    assert done.returncode == 2
    assert "leaves 192.0.2.7 alone" in done.stderr
    assert "start it on 192.0.2.7, or add --force_multi" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], ["a", "b", "c"]),
        (["--include", "b"], ["b"]),
        (["--include=c:0,1@a"], ["a", "c"]),
        (["-e", "a@b:1"], ["b", "c"]),
        (["--num_nodes", "1"], ["a"]),
    ],
)
def test_the_hosts_that_the_launcher_leaves(words: list[str], left: list[str]) -> None:
    assert chosen_hosts(["a", "b", "c"], ["python", DEEPSPEED, "--hostfile", "hosts", *words, "train.py"]) == left


def test_a_shell_that_starts_the_launcher_is_not_the_runner() -> None:
    """pdsh's command under a login shell that stays, as dash and older bashes do: the ssh session above it is what to
    watch."""
    shell = [
        "sh",
        "-c",
        "export A=b; cd /srv; /venv/bin/python -u -m deepspeed.launcher.launch --world_info=x train.py",
    ]
    assert runner_at(shell) is None
    assert runner_at(["/venv/bin/python", DEEPSPEED, "--num_gpus", "2", "train.py"]) == 1


def test_names_of_this_machine() -> None:
    assert is_this_machine("localhost")
    assert is_this_machine("me@127.0.1.1")
    assert is_this_machine(socket.gethostname())
    assert not is_this_machine("192.0.2.7")

"""The launcher's file of variables: what crashes it, what arrives as something else, and what no log should show."""

import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from dialogpt_ds.launching.environment_file import (
    EnvironmentFile,
    find_environment_files,
    is_secret,
    launcher_exports,
    read_environment_file,
)


def read(folder: Path, text: str) -> EnvironmentFile:
    file = folder / ".deepspeed_env"
    file.write_text(text, encoding="utf-8")
    return read_environment_file(file)


class Runner(PDSHRunner):
    """DeepSpeed's own, without a run."""

    def __init__(self) -> None:
        self.exports: dict[str, str] = {}


def arrives(line: str, name: str) -> str:
    """Return what a host gets of a variable: read and exported as DeepSpeed's launcher does it, and run by a shell."""
    runner = Runner()
    key, value = line.split("=", maxsplit=1)
    runner.add_export(key, value)
    script = "".join(f"export {key}={value}; " for key, value in runner.exports.items()) + f'printf %s "${name}"'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=10, check=False).stdout


def test_plain_variables_are_read_and_arrive(tmp_path: Path) -> None:
    text = "NCCL_SOCKET_IFNAME=eth0\nNCCL_IB_HCA=mlx5_0,mlx5_1\n GLOO_SOCKET_IFNAME = e0 \nOPTIONS=--a=1 --b\nEMPTY=\n"
    found = read(tmp_path, text)
    assert (found.problems, found.warnings, found.secrets) == ([], [], [])
    assert found.variables["GLOO_SOCKET_IFNAME"] == "e0"
    for line in text.splitlines():
        name = line.split("=")[0].strip()
        assert arrives(line, name) == found.variables[name]


@pytest.mark.parametrize("line", ["", "   ", "# the network", "NCCL_DEBUG"])
def test_lines_that_crash_the_launcher_are_named(tmp_path: Path, line: str) -> None:
    found = read(tmp_path, f"A=1\n{line}\nB=2\n")
    assert found.variables == {"A": "1", "B": "2"}
    (problem,) = found.problems
    assert problem.startswith(f"{tmp_path / '.deepspeed_env'}:2: ")
    assert "crashes the launcher" in problem
    with pytest.raises(ValueError, match="not enough values to unpack"):
        arrives(f"{line}\n", "A")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("# NCCL_DEBUG=INFO", "a comment with a =: the launcher exports it, and the shell drops all that follows"),
        ("NCCL-DEBUG=INFO", "'NCCL-DEBUG' is no name of a variable"),
        ("WORDS='a b'", "WORDS='a b' keeps its quotes, as a part of the value: write it without them"),
        ('WORDS="a b"', "does not arrive as it is written"),
        ("WHEN=`date`", "is run as a command by the shell on each host"),
    ],
)
def test_values_that_arrive_as_something_else_are_named(tmp_path: Path, line: str, words: str) -> None:
    (problem,) = read(tmp_path, f"{line}\n").problems
    assert ":1:" in problem
    assert words in problem
    name, _, value = line.partition("=")
    assert arrives(line, name.strip("# ").replace("-", "_")) != value.strip("'\"")


def test_the_word_export_is_a_warning_for_it_arrives(tmp_path: Path) -> None:
    found = read(tmp_path, "export NCCL_DEBUG=INFO\n")
    assert found.problems == []
    assert "the word export is not needed" in found.warnings[0]
    assert found.variables == {"NCCL_DEBUG": "INFO"}
    assert arrives("export NCCL_DEBUG=INFO", "NCCL_DEBUG") == "INFO"


def test_quotes_that_are_taken_off_are_no_problem(tmp_path: Path) -> None:
    assert read(tmp_path, 'NCCL_DEBUG="INFO"\n').problems == []
    assert arrives('NCCL_DEBUG="INFO"', "NCCL_DEBUG") == "INFO"


def test_secrets_are_told_by_their_names_and_shapes_and_never_shown(tmp_path: Path) -> None:
    keys = {"WANDB_API_KEY": "0123456789abcdef", "HF_TOKEN": '"abcdefghij klmnop"', "OTHER": "hf_" + "a" * 30}
    found = read(tmp_path, "NCCL_DEBUG=INFO\n" + "".join(f"{name}={value}\n" for name, value in keys.items()))
    assert found.secrets == list(keys)
    assert "abcdefghij" not in " ".join(found.problems)
    assert not is_secret("HF_TOKEN_PATH", str(tmp_path))
    assert not is_secret("USE_KEY", "true")


def test_the_files_are_those_that_the_launcher_reads(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "here"
    for place in (home, folder):
        place.mkdir()
        (place / ".deepspeed_env").write_text("A=1\n")
        (place / "mine").write_text("A=2\n")
    environment = {"HOME": str(home)}
    assert find_environment_files(environment, folder) == [home / ".deepspeed_env", folder / ".deepspeed_env"]
    assert find_environment_files(environment | {"DS_ENV_FILE": "mine"}, folder) == [home / "mine", folder / "mine"]
    assert find_environment_files(environment | {"DS_ENV_FILE": str(home / "mine")}, folder) == [home / "mine"]
    assert find_environment_files(environment | {"DS_ENV_FILE": "none"}, folder) == []


def test_the_launcher_gives_its_own_variables_and_those_of_the_file_but_no_secrets(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("CUDA_HOME=/opt/cuda\nHF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz0123456789\n")
    environment = {"HOME": str(tmp_path), "NCCL_DEBUG": "INFO", "PYTHONPATH": "/more", "EDITOR": "vi"}
    found = launcher_exports(environment, tmp_path)
    assert found == {"CUDA_HOME": "/opt/cuda", "NCCL_DEBUG": "INFO", "PYTHONPATH": f"{tmp_path}:/more"}

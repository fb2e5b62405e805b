"""The doctor as a user runs it: a set-up that is good, and broken ones with the line, the way out and the exit code."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dialogpt_ds.distributed.world import free_port
from dialogpt_ds.launching.op_folder import op_folder
from tests.conftest import ROOT
from tests.doctor.other_host import Examined, Keys, examine

CPU = ("--deepspeed_config", str(ROOT / "ds_configs" / "cpu_fp32.json"), "--wandb_mode", "disabled")
SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def good(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Examined:
    """Two processes on this machine's CPU, everything as it should be."""
    output = tmp_path_factory.mktemp("out") / "run"
    port = str(free_port())
    return examine(
        *CPU, "--model", "tiny", "--num_gpus", "2", "--train_input_file", str(shards), "--skip_eval",
        "--train_batch_size", "8", "--gradient_accumulation_steps", "2", "--output_dir", str(output), "--master_port",
        port, "--expect_world_size", "2",
    )  # fmt: skip


def test_a_good_set_up_ends_with_0_and_a_line_for_each_check(good: Examined) -> None:
    assert (good.code, good.errors) == (0, ""), good.output + good.errors
    of_machines = ["code", "versions", "gpus", "cuda", "precision", "ops", "port", "/dev/shm"]
    checks = ["hostfile", "variables", "config", *of_machines, "model", "tokenizer", "batch", "data", "fit", "wandb"]
    assert [check for check in checks if not good.found("ok", check)] == []
    assert good.lines[-1].startswith("doctor: ")
    assert ", 0 problems in " in good.lines[-1]
    assert "\x1b" not in good.output


def test_a_good_set_up_says_what_it_found(good: Examined) -> None:
    assert "torch 2." in good.found("ok", "versions")
    assert (
        "this run needs deepspeed_shm_comm (ranks on a CPU exchange data through shared memory; built "
        in good.found("ok", "ops")
    )
    assert f", in {op_folder()})" in good.found("ok", "ops")
    assert "2 processes x 2 micro-batches of 4 = 16 rows a step" in good.found("ok", "batch")
    assert "rows of 64" in good.found("ok", "data")
    assert "weights, gradients and optimizer take " in good.found("ok", "fit")


def test_it_leaves_nothing_behind(good: Examined) -> None:
    folder = Path(good.found("ok", "output_dir").split()[2]).parent
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Examined, Path, int]]:
    """Much that is wrong on one machine: 64 processes of a large model in fp16, no compiler, a port in use, no place to
    write."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / ".deepspeed_env").write_text(f"# the network\nWANDB_API_KEY={SECRET}\n")
    (folder / "hosts").write_text("worker-0 slots = 8\nworker-1 slots=8\nworker-1 slots=8\n")
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        run = examine(
            "--hostfile", "hosts", "--model", "762M", "--num_gpus", "64", "--master_port", str(port), "--output_dir",
            "/proc/run", "--wandb_mode", "disabled", folder=folder, PATH=str(folder), HOME=str(folder),
            DS_ENV_FILE=".deepspeed_env",
        )  # fmt: skip
        yield run, folder, port


def test_broken_set_ups_end_with_1(broken: tuple[Examined, Path, int]) -> None:
    run, _, _ = broken
    assert run.code == 1, run.output
    assert run.lines[-1].endswith(": training would fail")


def test_a_hostfile_with_spaces_and_a_host_twice(broken: tuple[Examined, Path, int]) -> None:
    found = broken[0].found("problem", "hostfile")
    assert (
        "hosts:1: 'worker-0 slots = 8' has spaces beside the =, which the launcher refuses: write worker-0 slots=8"
        in found
    )
    assert "hosts:3: 'worker-1 slots=8' names a host that line 2 has already" in found


def test_a_file_of_variables_with_a_comment_and_a_secret(broken: tuple[Examined, Path, int]) -> None:
    run, folder, _ = broken
    found = run.found("warning", "variables")
    assert f"{folder / '.deepspeed_env'}:1: a comment, which crashes the launcher" in found
    assert f"{folder / '.deepspeed_env'} holds WANDB_API_KEY, and the launcher prints its values" in found
    assert SECRET not in run.output + run.errors


def test_no_compiler_for_processes_on_a_cpu(broken: tuple[Examined, Path, int]) -> None:
    found = broken[0].found("problem", "ops")
    assert "no C++ compiler: DeepSpeed builds deepspeed_shm_comm" in found
    assert "apt-get install g++" in found


def test_a_port_in_use(broken: tuple[Examined, Path, int]) -> None:
    found = broken[0].found("problem", "port")
    assert f"port {broken[2]} is in use" in found
    assert f"process {os.getpid()}" in found
    assert "way out: another one for the launcher, here too: --master_port" in found


def test_an_output_dir_that_can_not_be_written_to(broken: tuple[Examined, Path, int]) -> None:
    found = broken[0].found("problem", "output_dir")
    assert "/proc can't be written to" in found
    assert "way out: name a folder that you may write to" in found


def test_fp16_on_a_cpu(broken: tuple[Examined, Path, int]) -> None:
    found = broken[0].found("problem", "precision")
    assert "fp16 is on, but this device (cpu) can't compute in it. Ways out: --deepspeed_config" in found


def test_a_model_that_does_not_fit(broken: tuple[Examined, Path, int]) -> None:
    found = broken[0].found("problem", "fit")
    assert "64 processes need " in found
    assert "774 million parameters in ZeRO-1, fp16" in found
    assert "way out: more processes with ZeRO-2 or 3" in found


@pytest.fixture(scope="module")
def misnamed(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Examined:
    """A host without an ssh server, and a configuration, a model and shards that are wrong."""
    folder = tmp_path_factory.mktemp("misnamed")
    (folder / "hosts").write_text("127.0.0.1 slots=2\n")
    (folder / "ds.json").write_text('{"zero_optimisation": {"stage": 2}}')
    return examine(
        "--hostfile", "hosts", "--ssh_port", str(keys.port), "--deepspeed_config", "ds.json", "--model", "346M",
        "--wandb_mode", "disabled", folder=folder, **keys.environment(), HF_HUB_OFFLINE="1",
    )  # fmt: skip


def test_a_host_without_an_ssh_server(misnamed: Examined) -> None:
    found = misnamed.found("problem", "ssh")
    assert misnamed.code == 1
    assert "127.0.0.1: ssh: nothing listens at its ssh port" in found
    assert "Connection refused" in found
    assert "way out: start its ssh server" in found


def test_an_unknown_key_of_the_deepspeed_configuration(misnamed: Examined) -> None:
    found = misnamed.found("problem", "config")
    assert "ds.json: 1 problem in the DeepSpeed configuration" in found
    assert 'DeepSpeed has no such key. Did you mean "zero_optimization"?' in found


def test_a_model_that_is_nowhere(misnamed: Examined) -> None:
    assert "--model '346M' is no preset (117M, 345M, 762M, small, tiny)" in misnamed.found("problem", "model")


def test_a_missing_hostfile_is_a_problem_and_a_wrong_option_a_wrong_command_line(tmp_path: Path) -> None:
    wrong = examine("--hostfle", "hosts")
    assert wrong.code == 2
    assert wrong.errors.startswith("error: command line: ")
    missing = examine(
        "--hostfile", str(tmp_path / "hosts"), *CPU, "--model", "tiny", "--num_gpus", "3", "--expect_world_size", "4",
        "--train_input_file", str(tmp_path),
    )  # fmt: skip
    assert missing.code == 1
    assert "does not exist" in missing.found("problem", "hostfile")
    assert "--expect_world_size 4, but the hostfile or --num_gpus make it 3 processes" in missing.found(
        "problem", "batch"
    )
    assert "manifest.json" in missing.found("problem", "data")

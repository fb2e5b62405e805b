"""What each process of a run sees of its machine before the ranks come together: its facts, and what they mean."""

import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dialogpt_ds.launching.machine_facts import DeviceFacts, device_facts
from dialogpt_ds.training import machine
from dialogpt_ds.training.machine import LaunchedRank, machine_troubles, offload_troubles_here
from tests.ranks import rank_tasks
from tests.ranks.rank_pool import RankPool

SmallWorld = tuple[Path, Path]
TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}


def rank(folder: Path, **changes: Any) -> LaunchedRank:
    values: dict[str, Any] = {"rank": 0, "world_size": 2, "local_rank": 0, "ranks_here": 2, "deepspeed": TORCH_ADAM}
    return LaunchedRank(**values | {"output_dir": folder / "run"} | changes)


def problems_and_warnings(rank: LaunchedRank) -> tuple[list[str], list[str]]:
    found = machine_troubles(rank)
    return [str(trouble) for trouble in found if trouble.fatal], [
        str(trouble) for trouble in found if not trouble.fatal
    ]


def test_a_machine_that_has_everything_gives_no_line_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this takes time")

    device_facts("fp32")  # a run has DeepSpeed imported, which starts programs to look around
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    assert problems_and_warnings(rank(tmp_path, checkpoint_bytes=1_000_000, cpu_is_meant=True)) == ([], [])


def test_a_cpu_run_without_a_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    problems, _ = problems_and_warnings(rank(tmp_path, local_rank=1))
    assert "no C++ compiler: DeepSpeed builds deepspeed_shm_comm (ranks on a CPU exchange data" in problems[0]
    assert problems[0].endswith("apt-get install g++")


def test_a_run_in_fp16_on_a_cpu_is_refused_by_every_rank(tmp_path: Path) -> None:
    for number in (0, 1):
        problems, _ = problems_and_warnings(rank(tmp_path, rank=number, local_rank=number, precision="fp16"))
        assert problems[0].startswith("fp16 is on, but this device (cpu) can't compute in it")


def test_offload_without_a_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    problem = str(offload_troubles_here(config)[0])
    assert problem.startswith(
        "no C++ compiler: DeepSpeed builds cpu_adam (the optimizer is offloaded to the host) on first use"
    )
    assert problem.endswith("apt-get install g++")
    assert offload_troubles_here({"zero_optimization": {"stage": 2}}) == []


def simulate_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, tuple[int, int]]) -> None:
    """Let PyTorch see GPUs of these names and compute capabilities, and DeepSpeed have found them."""
    monkeypatch.setattr(machine, "device_facts", lambda precision: DeviceFacts("cuda"))
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: gpus[number][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: gpus[number][1])


A100, V100, P100 = ("NVIDIA A100", (8, 0)), ("Tesla V100", (7, 0)), ("Tesla P100", (6, 0))


def test_bf16_that_a_gpu_only_emulates_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, A100, V100)
    monkeypatch.delenv("DS_ACCELERATOR")
    second = rank(tmp_path, rank=1, local_rank=1, precision="bf16")
    assert problems_and_warnings(second)[0] == [
        "bf16 needs compute capability 8.0, and the GPU of rank 1 (Tesla V100) has 7.0: take a fp16 configuration, "
        "such as ds_configs/zero1_fp16.json"
    ]
    assert problems_and_warnings(rank(tmp_path, precision="bf16"))[0] == []
    assert problems_and_warnings(rank(tmp_path, rank=1, local_rank=1, precision="fp16")) == ([], [])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert problems_and_warnings(second)[0] == [], "not on the GPUs"


def test_fp16_on_a_gpu_without_tensor_cores_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, P100)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    problems, warnings = problems_and_warnings(rank(tmp_path, precision="fp16"))
    assert (problems, warnings) == (
        [],
        ["fp16 is slow below compute capability 7.0, and the GPU of rank 0 (Tesla P100) has 6.0"],
    )


def test_a_rank_without_a_gpu_of_its_own_says_how_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate_gpus(monkeypatch, A100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    there = rank(tmp_path, rank=10, local_rank=2, ranks_here=3)
    assert problems_and_warnings(there)[0] == [], "DS_ACCELERATOR=cpu, which the tests set: as many ranks as one likes"
    monkeypatch.delenv("DS_ACCELERATOR")
    problems, _ = problems_and_warnings(there)
    assert problems == [
        "3 processes, but 2 GPUs (CUDA_VISIBLE_DEVICES=4,5): start no more than 2 there, by deepspeed --num_gpus 2 or "
        "slots=2 in the hostfile"
    ]
    assert problems_and_warnings(rank(tmp_path, rank=9, local_rank=1, ranks_here=3)) == ([], [])


def test_a_disk_without_room_for_a_checkpoint_is_a_problem_of_the_first_rank(tmp_path: Path) -> None:
    problems, _ = problems_and_warnings(rank(tmp_path, checkpoint_bytes=10**18))
    assert problems == [text for text in problems if "a single checkpoint takes about 1,000,000,000.0 GB" in text] != []
    assert problems_and_warnings(rank(tmp_path, rank=1, local_rank=1, checkpoint_bytes=10**18)) == ([], [])


def test_gpus_that_pytorch_can_not_use_are_said_unless_the_cpu_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "num_pci_gpus", lambda: 8)
    _, warnings = problems_and_warnings(rank(tmp_path))
    assert warnings[0].startswith(
        "this machine has 8 NVIDIA GPUs, but PyTorch is the build for CPUs, so training would be on the CPU"
    )
    assert problems_and_warnings(rank(tmp_path, cpu_is_meant=True))[1] == []


def test_secrets_in_the_file_of_variables_are_a_warning_where_there_are_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".deepspeed_env").write_text("WANDB_API_KEY=0123456789abcdef\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _, (warning,) = problems_and_warnings(rank(tmp_path, world_size=4, cpu_is_meant=True))
    assert warning.startswith(f"{tmp_path / '.deepspeed_env'} holds WANDB_API_KEY, and the launcher prints its values")
    assert "0123456789" not in warning
    assert problems_and_warnings(rank(tmp_path, cpu_is_meant=True)) == ([], [])


@pytest.mark.slow
def test_weights_and_optimizer_on_an_nvme_disk_change_no_loss(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path
) -> None:
    """Needs libaio-dev; building DeepSpeed's file access takes two minutes."""
    from deepspeed.accelerator import get_accelerator

    if shutil.which("g++") is None or not get_accelerator().get_op_builder("AsyncIOBuilder")().is_compatible():
        pytest.skip("libaio-dev is not installed")
    found = {}
    for device in ("none", "nvme"):
        place = {"device": device} | ({"nvme_path": str(tmp_path)} if device == "nvme" else {})
        zero = {"stage": 3, "offload_optimizer": place, "offload_param": place, "stage3_param_persistence_threshold": 0}
        config = rank_tasks.write_deepspeed(tmp_path, 3, "fp32", zero_optimization=zero | {"sub_group_size": 1_000_000})
        argv = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
                "--learning_rate", "1e-3", "--lr_schedule", "None", "--deepspeed_config", config]  # fmt: skip
        found[device] = two_ranks.run(rank_tasks.losses, argv, 4, timeout=500)[0]
    assert found["nvme"] == pytest.approx(found["none"], abs=2e-5)
    assert found["none"][-1] < found["none"][0] - 0.05

"""What each process of a run sees of its machine in a few milliseconds."""

import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dialogpt_ds.launching import machine_checks as start_checks
from dialogpt_ds.launching.checkpoint_size import approximate_parameters, checkpoint_bytes
from dialogpt_ds.launching.machine_checks import (
    LaunchedRank,
    launch_problems,
    shared_memory_findings,
    shared_memory_text,
)
from dialogpt_ds.launching.needed_ops import BuildTools, build_problems, needed_ops
from dialogpt_ds.launching.nvidia import num_pci_gpus, why_unused
from dialogpt_ds.model.load import find_model

TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}


def rank(folder: Path, **changes: Any) -> LaunchedRank:
    values: dict[str, Any] = {"rank": 0, "world_size": 2, "local_rank": 0, "ranks_here": 2, "deepspeed": TORCH_ADAM}
    return LaunchedRank(**values | {"output_dir": folder / "run"} | changes)


def test_a_machine_that_has_everything_gives_no_line_and_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this takes time")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(start_checks, "SHARED_MEMORY", tmp_path)
    assert launch_problems(rank(tmp_path, checkpoint_bytes=1_000_000, cpu_is_meant=True)) == ([], [])


def test_a_cpu_run_without_a_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    problems, _ = launch_problems(rank(tmp_path, local_rank=1))
    assert "no C++ compiler: DeepSpeed builds deepspeed_shm_comm (ranks on a CPU exchange data" in problems[0]
    assert problems[0].endswith("apt-get install g++")


def simulate_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, tuple[int, int]]) -> None:
    """Let PyTorch see GPUs of these names and compute capabilities."""
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
    assert launch_problems(second)[0] == [
        "bf16 needs compute capability 8.0, and the GPU of rank 1 (Tesla V100) has 7.0: take a fp16 configuration, such as "
        "ds_configs/zero1_fp16.json"
    ]
    assert launch_problems(rank(tmp_path, precision="bf16"))[0] == []
    assert launch_problems(rank(tmp_path, rank=1, local_rank=1, precision="fp16")) == ([], [])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert launch_problems(second)[0] == [], "not on the GPUs"


def test_fp16_on_a_gpu_without_tensor_cores_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, P100)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(start_checks, "SHARED_MEMORY", tmp_path)
    problems, warnings = launch_problems(rank(tmp_path, precision="fp16"))
    assert (problems, warnings) == ([], ["fp16 is slow below compute capability 7.0, and the GPU of rank 0 (Tesla P100) has 6.0"])


def test_a_rank_without_a_gpu_of_its_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, A100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    there = rank(tmp_path, rank=10, local_rank=2, ranks_here=3)
    assert launch_problems(there)[0] == [], "DS_ACCELERATOR=cpu, which the tests set: as many ranks as one likes"
    monkeypatch.delenv("DS_ACCELERATOR")
    problems, _ = launch_problems(there)
    (text,) = [problem for problem in problems if "GPU" in problem]
    assert text.startswith(
        "rank 10 is number 3 on this host and would take GPU 2, but there are only 2 here (CUDA_VISIBLE_DEVICES=4,5)"
    )
    assert "--num_gpus 2, or slots=2" in text


def test_a_disk_without_room_for_a_checkpoint_is_a_problem_of_the_first_rank(tmp_path: Path) -> None:
    problems, _ = launch_problems(rank(tmp_path, checkpoint_bytes=10**18))
    assert problems == [text for text in problems if "one checkpoint takes about 1,000,000,000.0 GB" in text] != []
    assert launch_problems(rank(tmp_path, rank=1, local_rank=1, checkpoint_bytes=10**18)) == ([], [])


def test_shared_memory_must_hold_what_ranks_on_a_cpu_map_there() -> None:
    (text,), _ = shared_memory_text("/dev/shm", 64 << 20, 64 << 20, 2, on_gpu=False)
    assert "67 MB free of 67, and 2 ranks on a CPU need 138 MB there: a container gets more by docker run --shm-size=1g" in text
    assert shared_memory_text("/dev/shm", 64 << 20, 64 << 20, 1, on_gpu=False) == ([], [])
    problems, (warning,) = shared_memory_text("/dev/shm", 64 << 20, 64 << 20, 8, on_gpu=True)
    assert problems == []
    assert "NCCL may need more for 8 GPUs" in warning
    assert shared_memory_text("/dev/shm", 8 << 30, 8 << 30, 8, on_gpu=True) == ([], [])


def test_a_host_without_shared_memory_is_a_problem(tmp_path: Path) -> None:
    (text,), _ = shared_memory_findings(tmp_path / "none", 2, on_gpu=False)
    assert "can't be looked at" in text


def test_gpus_that_pytorch_can_not_use_are_said_unless_the_cpu_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_checks, "num_pci_gpus", lambda: 8)
    _, warnings = launch_problems(rank(tmp_path))
    assert warnings[0].startswith(
        "this machine has 8 NVIDIA GPUs, but PyTorch is the build for CPUs, so training would be on the CPU"
    )
    assert launch_problems(rank(tmp_path, cpu_is_meant=True))[1] == []


def test_why_a_gpu_is_not_used_depends_on_driver_and_build() -> None:
    assert "pip install --force-reinstall torch" in why_unused(1, 1, None)
    assert "docker run --gpus all" in why_unused(1, 0, "12.8")
    assert "look at nvidia-smi" in why_unused(1, 1, "12.8")


def test_gpus_on_the_bus_are_counted_without_their_sound(tmp_path: Path) -> None:
    for name, maker, kind in (("0", "0x10de", "0x030200"), ("1", "0x10de", "0x040300"), ("2", "0x8086", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{maker}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert num_pci_gpus(tmp_path) == 1
    assert num_pci_gpus(tmp_path / "none") == 0


def test_secrets_in_the_file_of_variables_are_a_warning_where_there_are_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".deepspeed_env").write_text("WANDB_API_KEY=0123456789abcdef\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _, (warning,) = launch_problems(rank(tmp_path, world_size=4, cpu_is_meant=True))
    assert warning.startswith(f"{tmp_path / '.deepspeed_env'} holds WANDB_API_KEY, and the launcher prints its values")
    assert "0123456789" not in warning
    assert launch_problems(rank(tmp_path, cpu_is_meant=True)) == ([], [])


@pytest.mark.parametrize(
    ("config", "on_gpu", "names"),
    [
        (TORCH_ADAM, True, []),
        (TORCH_ADAM, False, ["deepspeed_shm_comm"]),
        ({"optimizer": {"type": "AdamW", "params": {"bias_correction": True}}}, True, ["fused_adam"]),
        ({"optimizer": {"type": "Lamb"}}, True, ["fused_lamb"]),
        ({"optimizer": {"type": "SGD"}}, True, []),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, True, ["cpu_adam"]),
        (TORCH_ADAM | {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, True, ["async_io"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": None}, **TORCH_ADAM}, True, []),
    ],
)
def test_the_operations_of_a_configuration(config: dict[str, Any], on_gpu: bool, names: list[str]) -> None:
    assert [op.name for op in needed_ops(config, on_gpu)] == names


def test_nothing_to_build_needs_no_tools() -> None:
    nothing = BuildTools(None, None)
    assert list(build_problems([], nothing)) == []
    compiler, ninja = build_problems(needed_ops(TORCH_ADAM, on_gpu=False), nothing)
    assert ("no C++ compiler" in compiler, "pip install ninja" in ninja) == (True, True)


@pytest.mark.parametrize("name", ["117M", "tiny"])
def test_the_number_of_parameters_is_gpt2s_own(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = find_model(name, 0.0, 0, 0).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert approximate_parameters(config) == sum(p.numel() for p in model.parameters())


def test_a_checkpoint_holds_weights_master_weights_and_two_moments() -> None:
    assert checkpoint_bytes(1_000, "fp16") == 14_000
    assert checkpoint_bytes(1_000, "fp32") == 16_000

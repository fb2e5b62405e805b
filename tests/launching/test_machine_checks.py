"""What a machine's facts mean for a run, and how they are read."""

from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.hardware import CpuRates
from dialogpt_ds.launching.machine_checks import (
    Trouble,
    count_troubles,
    device_troubles,
    disk_troubles,
    offload_troubles,
    op_troubles,
    shared_memory_troubles,
    why_unused,
)
from dialogpt_ds.launching.machine_facts import BuildTools, DeviceFacts, num_pci_gpus, nvme_folders, shared_memory
from dialogpt_ds.launching.needed_ops import needed_ops, offload_ops

TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
SHM = Path("/dev/shm")


def test_a_trouble_in_a_line_has_its_way_out() -> None:
    assert (str(Trouble("broken", "mend it")), str(Trouble("broken"))) == ("broken: mend it", "broken")


def test_more_processes_than_gpus_are_a_problem() -> None:
    (trouble,) = count_troubles(3, 2, "4,5")
    assert str(trouble) == (
        "3 processes, but 2 GPUs (CUDA_VISIBLE_DEVICES=4,5): start no more than 2 there, by deepspeed --num_gpus 2 or "
        "slots=2 in the hostfile"
    )
    assert list(count_troubles(2, 2)) == []


def test_fp16_without_hardware_and_slow_bf16_are_said() -> None:
    (trouble,) = device_troubles("fp16", DeviceFacts("cpu", computes_fp16=False))
    assert trouble.text.startswith(
        "fp16 is on, but this device (cpu) can't compute in it. Ways out: --deepspeed_config"
    )
    assert list(device_troubles("fp32", DeviceFacts("cpu", computes_fp16=False))) == []
    (slow,) = device_troubles("bf16", DeviceFacts("cpu", rates=CpuRates(fp32=119e9, bf16=25.04e9)))
    assert not slow.fatal
    assert slow.text == (
        "bf16 is slower than fp32 on this CPU (a matrix product on one core, measured now: 25 GFLOP/s in bf16, 119 in "
        "fp32): take --deepspeed_config ds_configs/cpu_fp32.json"
    )
    assert list(device_troubles("bf16", DeviceFacts("cpu", rates=CpuRates(fp32=119e9, bf16=119e9)))) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "offload_optimizer.nvme_path is missing; name a folder on the NVMe disk"),
        ("/no_such_disk_here", "offload_optimizer.nvme_path '/no_such_disk_here' does not exist; make it"),
        (
            "/proc/version/x",
            "offload_optimizer.nvme_path '/proc/version/x' can't be written to (/proc/version is no folder)",
        ),
    ],
)
def test_a_place_for_nvme_offload_that_is_none_is_named(path: str | None, words: str) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": path}}
    (trouble,) = offload_troubles(zero, nvme_folders(zero), async_io=True)
    assert words in trouble.text


def test_offload_to_nvme_needs_a_library_and_a_folder_of_ones_own(tmp_path: Path) -> None:
    zero = {"offload_param": {"device": "nvme", "nvme_path": str(tmp_path / "to-be-made")}}
    assert list(offload_troubles(zero, nvme_folders(zero), async_io=True)) == []
    (trouble,) = offload_troubles(zero, nvme_folders(zero), async_io=False)
    assert "apt-get install libaio-dev" in trouble.text


def test_a_disk_needs_room_for_one_checkpoint_and_better_for_all() -> None:
    (trouble,) = disk_troubles(Path("/out"), 9 * 10**8, 10**9, of_run=54 * 10**8, kept=3)
    assert str(trouble) == (
        "/out has 0.9 GB free, and a single checkpoint takes about 1.0 GB: make room, or name a folder on another disk"
    )
    (trouble,) = disk_troubles(Path("/out"), 3 * 10**9, 10**9, of_run=54 * 10**8, kept=3)
    assert not trouble.fatal
    assert "3 checkpoints that are kept, the best, the next one and the model take about 5.4 GB" in trouble.text
    assert list(disk_troubles(Path("/out"), 3 * 10**9, 10**9)) == []


def test_shared_memory_must_hold_what_ranks_on_a_cpu_map_there() -> None:
    (small,) = shared_memory_troubles(SHM, 64 << 20, 64 << 20, 2, on_gpu=False)
    assert small.fatal
    assert (
        "67 MB free of 67, and 2 ranks on a CPU need 138 MB there: a container gets more by docker run --shm-size=1g"
        in small.text
    )
    assert list(shared_memory_troubles(SHM, 64 << 20, 64 << 20, 1, on_gpu=False)) == []
    (doubtful,) = shared_memory_troubles(SHM, 64 << 20, 64 << 20, 8, on_gpu=True)
    assert not doubtful.fatal
    assert "NCCL may need more for 8 GPUs" in doubtful.text
    assert list(shared_memory_troubles(SHM, 8 << 30, 8 << 30, 8, on_gpu=True)) == []


def test_a_host_without_shared_memory_is_a_problem(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    (trouble,) = shared_memory_troubles(folder, *shared_memory(folder), 2, on_gpu=False)
    assert (trouble.fatal, "can't be looked at" in trouble.text) == (True, True)


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


def test_the_operations_that_offload_alone_brings() -> None:
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert [op.name for op in offload_ops(config, on_gpu=False)] == ["cpu_adam"]
    assert [op.name for op in needed_ops(config, on_gpu=False)] == ["deepspeed_shm_comm", "cpu_adam"]


def test_nothing_to_build_needs_no_tools() -> None:
    nothing = BuildTools(None, None, "clang++")
    assert list(op_troubles([], nothing)) == []
    compiler, ninja = op_troubles(needed_ops(TORCH_ADAM, on_gpu=False), nothing)
    assert "there is no clang++ on PATH; on Debian, apt-get install g++" in compiler.text
    assert "pip install ninja" in ninja.text

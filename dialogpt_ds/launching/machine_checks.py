"""What a machine's facts mean for a run: pure functions, for a rank about its own machine and for the doctor about all
hosts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dialogpt_ds.launching.machine_facts import BuildTools, DeviceFacts, NvmeFolder
from dialogpt_ds.launching.needed_ops import NeededOp

TENSOR_CORES, BF16 = (7, 0), (8, 0)
"""Compute capabilities from which fp16 is fast and bf16 is there (CUDA C++ programming guide); below, PyTorch emulates
bf16."""
CPU_RANK_BYTES = 69_000_000
"""What DeepSpeed's shared-memory operation takes in /dev/shm for each rank on a CPU (measured, 0.19.8)."""
GPU_RANK_BYTES = 128_000_000
"""Room there below which a warning is due for each rank on a GPU: NCCL keeps the buffers of a pair of GPUs there that
can't reach each other directly, and fails where it is full; NVIDIA's guide advises 1 GB for a container with eight."""


@dataclass(frozen=True)
class Trouble:
    """What would make a run fail on a machine, or a warning."""

    text: str
    way_out: str = ""
    """What to do, where the text does not say it."""
    fatal: bool = True
    """Whether the run would fail."""

    def __str__(self) -> str:
        return f"{self.text}: {self.way_out}" if self.way_out else self.text


def count_troubles(processes: int, visible: int, chosen: str | None = None) -> Iterator[Trouble]:
    """Yield that a host has fewer GPUs than processes.

    Args:
        processes: of the run there.
        visible: GPUs that PyTorch can use there.
        chosen: CUDA_VISIBLE_DEVICES there, where it is set.
    """
    if processes > visible:
        because = f" (CUDA_VISIBLE_DEVICES={chosen})" if chosen is not None else ""
        yield Trouble(
            f"{processes} processes, but {visible} GPU{'s' * (visible != 1)}{because}",
            f"start no more than {visible} there, by deepspeed --num_gpus {visible} or slots={visible} in the hostfile",
        )


def why_unused(num_pci: int, num_files: int, cuda_of_torch: str | None) -> str:
    """Say why PyTorch uses no GPU of a machine that has some, and the way out.

    Args:
        num_pci: GPUs on the bus.
        num_files: GPUs that the driver gives to this system or container.
        cuda_of_torch: CUDA's version that PyTorch was built with; None for its CPU build.
    """
    has = f"this machine has {max(num_pci, num_files)} NVIDIA GPU{'s' * (max(num_pci, num_files) != 1)}"
    if cuda_of_torch is None:
        return (
            f"{has}, but PyTorch is the build for CPUs, so training would be on the CPU: pip install --force-reinstall "
            "torch from an index of CUDA builds (see launch/constraints.txt for the version)"
        )
    if not num_files:
        return (
            f"{has}, but no driver gives them to this system (no /dev/nvidia0), so training would be on the CPU: in a "
            "container, start it with docker run --gpus all; else install NVIDIA's driver"
        )
    return (
        f"{has}, but PyTorch (CUDA {cuda_of_torch}) can't use them, so training would be on the CPU: look at "
        "nvidia-smi; the usual reasons are a driver too old for this CUDA, or one that was updated without a restart"
    )


def capability_troubles(precision: str, capability: tuple[int, int], gpu: str) -> Iterator[Trouble]:
    """Yield that a GPU can't compute in a precision, or is slow in it. DeepSpeed takes emulated bf16 for good.

    Args:
        precision: of the run.
        capability: compute capability of the GPU, or the lowest of several.
        gpu: what to call it.
    """
    shown = f"{gpu} has {capability[0]}.{capability[1]}"
    if precision == "bf16" and capability < BF16:
        way_out = "take a fp16 configuration, such as ds_configs/zero1_fp16.json"
        yield Trouble(f"bf16 needs compute capability {BF16[0]}.{BF16[1]}, and {shown}", way_out)
    if precision == "fp16" and capability < TENSOR_CORES:
        yield Trouble(
            f"fp16 is slow below compute capability {TENSOR_CORES[0]}.{TENSOR_CORES[1]}, and {shown}", fatal=False
        )


def device_troubles(precision: str, device: DeviceFacts) -> Iterator[Trouble]:
    """Yield that the device of a run can't compute in its precision, or is slow in it."""
    if precision == "fp16" and not device.computes_fp16:
        yield Trouble(
            f"fp16 is on, but this device ({device.name}) can't compute in it. Ways out: --deepspeed_config "
            "ds_configs/cpu_bf16.json (or another bf16 one), or --fp16 False for fp32, or a machine with a GPU."
        )
    if device.rates is not None and not device.rates.bf16_is_fast:
        yield Trouble(
            f"bf16 is slower than fp32 on this CPU (a matrix product on one core, measured now: {device.rates}): take "
            "--deepspeed_config ds_configs/cpu_fp32.json",
            fatal=False,
        )


def offload_troubles(zero: dict[str, Any], folders: Mapping[str, NvmeFolder], async_io: bool) -> Iterator[Trouble]:
    """Yield what a machine lacks for the offload to NVMe of a `zero_optimization` block; compilers are op_troubles()'s.

    Args:
        zero: the block.
        folders: what is at each path that the block names.
        async_io: whether DeepSpeed's operation for NVMe can be had.
    """
    on_disk = [
        name for name in ("offload_optimizer", "offload_param") if (zero.get(name) or {}).get("device") == "nvme"
    ]
    for name in on_disk:
        yield from _path_troubles(f"zero_optimization.{name}.nvme_path", zero[name].get("nvme_path"), folders)
    if on_disk and not async_io:
        yield Trouble(
            "offload to NVMe needs the library libaio with its headers (and io_setup allowed by the container): on "
            "Debian, apt-get "
            'install libaio-dev. Or offload to the host\'s memory: "device": "cpu"'
        )


def _path_troubles(key: str, path: str | None, folders: Mapping[str, NvmeFolder]) -> Iterator[Trouble]:
    if not path:
        yield Trouble(
            f'{key} is missing; name a folder on the NVMe disk, which every node has, or write "device": "cpu"'
        )
        return
    if (found := folders.get(path)) is None:
        return  # it was not looked at, which is said elsewhere
    if not (found.is_folder and found.is_writable):
        why = "read-only" if found.is_folder else "no folder"
        yield Trouble(f"{key} {path!r} can't be written to ({found.existing} is {why}); name another folder")
    elif Path(path).is_absolute() and Path(found.existing) == Path(Path(path).anchor) != Path(path):
        yield Trouble(f"{key} {path!r} does not exist; make it, on the NVMe disk, or name the right folder")


def op_troubles(to_build: Sequence[NeededOp], tools: BuildTools, cuda_of_torch: str | None = None) -> Iterator[Trouble]:
    """Yield what is missing for the operations that have to be built on their first use."""
    if not to_build:
        return
    what = ", ".join(f"{op.name} ({op.why})" for op in to_build)
    if tools.compiler is None:
        yield Trouble(
            f"no C++ compiler: DeepSpeed builds {what} on first use, and there is no {tools.compiler_name} on PATH; on "
            "Debian, apt-get install g++"
        )
    if tools.ninja is None:
        yield Trouble(
            f"no ninja: DeepSpeed builds {what} on first use, and there is no ninja on PATH; pip install ninja"
        )
    on_gpu = [op for op in to_build if op.on_gpu]
    if on_gpu and tools.nvcc is not None:
        yield from _nvcc_troubles(on_gpu, tools.nvcc, cuda_of_torch or "?")


def _nvcc_troubles(ops: Sequence[NeededOp], nvcc: str, cuda: str) -> Iterator[Trouble]:
    what = ", ".join(f"{op.name} ({op.why})" for op in ops)
    if not nvcc:
        yield Trouble(
            f"no nvcc: DeepSpeed builds {what} with CUDA's compiler on first use. Install the CUDA toolkit {cuda} (or "
            f"set CUDA_HOME), or "
            'do without: "torch_adam": true in optimizer.params, no offload to NVMe'
        )
    elif nvcc.split(".")[0] != cuda.split(".")[0]:
        yield Trouble(
            f"nvcc is of CUDA {nvcc}, PyTorch of {cuda}, and DeepSpeed refuses to build {what} with it: install the "
            f"toolkit {cuda}"
        )


def shared_memory_troubles(where: Path, total: int, free: int, ranks: int, on_gpu: bool) -> Iterator[Trouble]:
    """Yield that a host's shared memory is too small for its ranks, or may be.

    Args:
        where: it is mounted.
        total: bytes; 0: it can't be looked at.
        free: bytes.
        ranks: processes on the host.
        on_gpu: whether the run is on GPUs.
    """
    has = f"{where} has {free / 1e6:,.0f} MB free of {total / 1e6:,.0f}"
    way_out = (
        f"a container gets more by docker run --shm-size=1g; on a host: mount -o remount,size=1g {where}, or remove "
        "what fills it"
    )
    needed, wanted = CPU_RANK_BYTES * ranks, GPU_RANK_BYTES * ranks
    if not total:
        yield Trouble(f"{where} can't be looked at, and ranks exchange data there: mount a tmpfs on it")
    elif not on_gpu and ranks > 1 and free < needed:
        yield Trouble(f"{has}, and {ranks} ranks on a CPU need {needed / 1e6:,.0f} MB there: {way_out}")
    elif on_gpu and ranks > 1 and free < wanted:
        text = f"{has}; NCCL may need more for {ranks} GPUs, and ends with 'No space left on device' then: {way_out}"
        yield Trouble(text, fatal=False)


def disk_troubles(output_dir: Path, free: int, checkpoint: int, of_run: int = 0, kept: int = 0) -> Iterator[Trouble]:
    """Yield that the disk of output_dir has no room for a single checkpoint, or not for all that the run keeps there.

    Args:
        output_dir: of the run.
        free: bytes.
        checkpoint: bytes of one checkpoint, about; 0: not known.
        of_run: bytes of all that the run keeps there at once; 0: not known, or not asked.
        kept: `--keep_checkpoints`.
    """
    has = f"{output_dir} has {free / 1e9:,.1f} GB free"
    if free < checkpoint:
        yield Trouble(
            f"{has}, and a single checkpoint takes about {checkpoint / 1e9:,.1f} GB",
            "make room, or name a folder on another disk",
        )
    elif free < of_run:
        yield Trouble(
            f"{has}; {kept} checkpoints that are kept, the best, the next one and the model take about "
            f"{of_run / 1e9:,.1f} GB",
            "make room, or keep fewer: --keep_checkpoints 1",
            fatal=False,
        )

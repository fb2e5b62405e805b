"""What machine this is, and the most that it does: the numbers that all others are to be held against."""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from tests.gpu.common import DEVICE, ON_GPU, checked

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "numpy",
    "webdataset",
    "jsonargparse",
    "tokenizers",
    "safetensors",
)
REPEATS = 10


def main() -> None:
    """Make the checks."""
    with checked("environment.versions") as details:
        details |= versions()
    if ON_GPU:
        with checked("environment.gpu") as details:
            details |= gpu()
    with checked("environment.peaks") as details:
        details |= peaks()


def versions() -> dict[str, Any]:
    """Return versions; those of packages that are missing are None."""
    found: dict[str, Any] = {"python": platform.python_version(), "executable": sys.executable}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["compilers"] = [name for name in ("gcc", "g++", "nvcc", "ninja") if shutil.which(name)]
    return found | {"cuda_of_torch": torch.version.cuda, "cores": torch.get_num_threads()}


def gpu() -> dict[str, Any]:
    """Return what the driver and PyTorch say of the GPU."""
    assert torch.cuda.is_available(), "PyTorch can use no GPU here"
    fields = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    said = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    properties = torch.cuda.get_device_properties(0)
    return {
        "nvidia_smi": said.stdout.strip() or said.stderr.strip(),
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "count": torch.cuda.device_count(),
    }


def peaks() -> dict[str, float]:
    """Return operations per second of matrix products (TFLOP/s) and bytes per second of copies (GB/s, read and
    written)."""
    size, width = (8_192, 2**30) if ON_GPU else (512, 2**24)
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        found[f"{dtype}".removeprefix("torch.") + "_tflops"] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b) / 1e12
    source = torch.empty(width, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    found["copy_gb_s"] = 2 * width / seconds_of(lambda: target.copy_(source)) / 1e9
    if ON_GPU:
        pinned = torch.empty(width // 4, dtype=torch.uint8).pin_memory()
        found["host_to_device_gb_s"] = (
            width / 4 / seconds_of(lambda: target[: width // 4].copy_(pinned, non_blocking=True)) / 1e9
        )
    return {name: round(value, 3) for name, value in found.items()}


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that the device takes for some work, the mean of REPEATS after three."""
    import time

    for _ in range(3):
        work()
    if not ON_GPU:
        started = time.perf_counter()
        for _ in range(REPEATS):
            work()
        return (time.perf_counter() - started) / REPEATS
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(REPEATS):
        work()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3 / REPEATS


if __name__ == "__main__":
    main()

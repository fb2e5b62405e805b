"""What a run asks of this machine, looked at before the ranks come together."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dialogpt_ds.errors import UserError
from dialogpt_ds.launching.needed_ops import compiler
from dialogpt_ds.matmul import cpu_rates


def check_requirements(precision: str, deepspeed: dict[str, Any]) -> str | None:
    """Check that this machine can compute in the precision and offload to where the configuration says.

    Args:
        precision: of the run.
        deepspeed: the final DeepSpeed configuration.

    Returns:
        A warning, or None.

    Raises:
        UserError: it can't; names all that is missing, and the ways out.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    problems = []
    if precision == "fp16" and not accelerator.is_fp16_supported():
        problems.append(
            f"fp16 is on, but this device ({accelerator.device_name()}) can't compute in it. Ways out: --deepspeed_config "
            "ds_configs/cpu_bf16.json (or another bf16 one), or --fp16 False for fp32, or a machine with a GPU."
        )
    problems += offload_problems(deepspeed.get("zero_optimization", {}), accelerator)
    if problems:
        raise UserError("\n".join(problems))
    if precision == "bf16" and accelerator.device_name() == "cpu" and not cpu_rates().bf16_is_fast:
        return (
            f"warning: bf16 is slower than fp32 on this CPU (a matrix product on one core, measured now: {cpu_rates()}): take "
            "--deepspeed_config ds_configs/cpu_fp32.json"
        )
    return None


def offload_problems(zero: dict[str, Any], accelerator: Any) -> Iterator[str]:
    """Yield what this machine lacks for the offload of a `zero_optimization` block."""
    devices = set()
    for name in ("offload_optimizer", "offload_param"):
        block = zero.get(name) or {}
        devices.add(block.get("device", "none"))
        if block.get("device") == "nvme":
            yield from _path_problems(f"zero_optimization.{name}.nvme_path", block.get("nvme_path"))
    if devices - {"none"} and shutil.which(compiler()) is None and not _built_ahead():
        yield (
            "offload needs a C++ compiler, with which DeepSpeed builds its Adam for the host (and its file access for NVMe) on first "
            f"use, and there is no {compiler()} on PATH: on Debian, apt-get install g++"
        )
    if "nvme" in devices and not accelerator.get_op_builder("AsyncIOBuilder")().is_compatible():
        yield (
            "offload to NVMe needs the library libaio with its headers (and io_setup allowed by the container): on Debian, apt-get "
            'install libaio-dev. Or offload to the host\'s memory: "device": "cpu"'
        )


def _built_ahead() -> bool:
    """Return whether DeepSpeed was installed with its Adam for the host, so that nothing has to be built."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("cpu_adam"))


def _path_problems(key: str, path: str | None) -> Iterator[str]:
    if not path:
        yield f'{key} is missing; name a folder on the NVMe disk, which every node has, or write "device": "cpu"'
        return
    folder = Path(path)
    # DeepSpeed makes the folder where its parent can be written to.
    place = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        why = "read-only" if os.path.isdir(place) else "no folder"
        yield f"{key} {path!r} can't be written to ({place} is {why}); name another folder"
    elif folder.is_absolute() and place != folder and place == Path(folder.anchor):
        yield f"{key} {path!r} does not exist; make it, on the NVMe disk, or name the right folder"

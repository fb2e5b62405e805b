"""DeepSpeed's compiled operations: which of them a run really uses, and what is needed to build one on its first use."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dialogpt_ds.config.offload import offload_devices

SHM_OP = "deepspeed_shm_comm"
_ON_HOST = {"adam": "cpu_adam", "adamw": "cpu_adam", "adagrad": "cpu_adagrad", "lion": "cpu_lion"}
_ON_GPU = {"adam": "fused_adam", "adamw": "fused_adam", "lamb": "fused_lamb", "lion": "fused_lion"}
"""Optimizers of DeepSpeed's own by their type in small letters, and the operation that each is made of."""


@dataclass(frozen=True)
class NeededOp:
    """A compiled operation that a run uses."""

    name: str
    """As DeepSpeed's ds_report calls it."""
    why: str
    on_gpu: bool
    """Built with nvcc, CUDA's compiler, beside the C++ one."""


def needed_ops(deepspeed: dict[str, Any], on_gpu: bool) -> list[NeededOp]:
    """Return the operations that a run loads; plain ZeRO on GPUs with torch's own AdamW, the default here, needs none.

    Args:
        deepspeed: the final configuration.
        on_gpu: whether the run is on GPUs.
    """
    found = [] if on_gpu else [NeededOp(SHM_OP, "ranks on a CPU exchange data through shared memory", False)]
    place_of_optimizer, place_of_weights = offload_devices(deepspeed)
    optimizer = deepspeed.get("optimizer") or {}
    kind, of_torch = str(optimizer.get("type", "AdamW")).lower(), (optimizer.get("params") or {}).get("torch_adam") is True
    if kind in ("adam", "adamw") and of_torch:
        pass
    elif place_of_optimizer != "none":
        if kind in _ON_HOST:
            found.append(NeededOp(_ON_HOST[kind], "the optimizer is offloaded to the host", False))
    elif kind in _ON_GPU:
        found.append(NeededOp(_ON_GPU[kind], f"the optimizer is DeepSpeed's own {optimizer.get('type', 'AdamW')}", on_gpu))
    if "nvme" in (place_of_optimizer, place_of_weights):
        found.append(NeededOp("async_io", "weights or optimizer are offloaded to an NVMe disk", on_gpu))
    return found


def compiler() -> str:
    """Return the C++ compiler that torch calls for a build."""
    return (os.environ.get("CXX") or "c++").split()[0]


@dataclass(frozen=True)
class BuildTools:
    """Programs that a build on first use calls, where they are; None where they aren't."""

    compiler: str | None
    ninja: str | None


def find_build_tools(path: str | None = None) -> BuildTools:
    """Return the programs on a PATH: this process's, with the folder of its Python in front as the trainer puts it there, by default."""
    path = path or os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    return BuildTools(shutil.which(compiler(), path=path), shutil.which("ninja", path=path))


def build_problems(ops: list[NeededOp], tools: BuildTools) -> Iterator[str]:
    """Yield what is missing for the operations that have to be built on their first use."""
    if not ops:
        return
    what = ", ".join(f"{op.name} ({op.why})" for op in ops)
    if tools.compiler is None:
        yield f"no C++ compiler: DeepSpeed builds {what} on first use, and there is no {compiler()} on PATH; on Debian, apt-get install g++"
    if tools.ninja is None:
        yield f"no ninja: DeepSpeed builds {what} on first use, and there is no ninja on PATH; pip install ninja"

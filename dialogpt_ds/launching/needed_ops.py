"""DeepSpeed's compiled operations: which of them a run really uses."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dialogpt_ds.config.offload import offload_devices

SHM_OP, ASYNC_IO = "deepspeed_shm_comm", "async_io"
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
    kind = _kind_of_own(deepspeed)
    if offload_devices(deepspeed)[0] == "none" and kind in _ON_GPU:
        name = (deepspeed.get("optimizer") or {}).get("type", "AdamW")
        found.append(NeededOp(_ON_GPU[kind], f"the optimizer is DeepSpeed's own {name}", on_gpu))
    return found + offload_ops(deepspeed, on_gpu)


def offload_ops(deepspeed: dict[str, Any], on_gpu: bool) -> list[NeededOp]:
    """Return those of a run's operations that it loads for its offload."""
    devices, kind = offload_devices(deepspeed), _kind_of_own(deepspeed)
    found = []
    if devices[0] != "none" and kind in _ON_HOST:
        found.append(NeededOp(_ON_HOST[kind], "the optimizer is offloaded to the host", False))
    if "nvme" in devices:
        found.append(NeededOp(ASYNC_IO, "weights or optimizer are offloaded to an NVMe disk", on_gpu))
    return found


def _kind_of_own(deepspeed: dict[str, Any]) -> str:
    """Return the type of DeepSpeed's own optimizer in small letters; "" where torch's Adam is asked for."""
    optimizer = deepspeed.get("optimizer") or {}
    kind = str(optimizer.get("type", "AdamW")).lower()
    of_torch = (optimizer.get("params") or {}).get("torch_adam") is True
    return "" if kind in ("adam", "adamw") and of_torch else kind


def unbuilt(ops: Iterable[NeededOp], built: set[str]) -> list[NeededOp]:
    """Return the operations that have to be built on their first use."""
    return [op for op in ops if op.name not in built]

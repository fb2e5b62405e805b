"""Where DeepSpeed keeps what is not on the GPU."""

from typing import Any


def offload_devices(deepspeed: dict[str, Any]) -> tuple[str, str]:
    """Return where a configuration keeps optimizer and weights: none (the GPU), cpu or nvme."""
    zero = deepspeed.get("zero_optimization") or {}
    optimizer, weights = ((zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param"))
    return optimizer, weights

"""Which precision a GPU can compute in, by its compute capability."""

TENSOR_CORES, BF16 = (7, 0), (8, 0)
"""Compute capabilities from which fp16 is fast and bf16 is there (CUDA C++ programming guide); below, PyTorch emulates bf16."""
FP16_CONFIGURATION = "take a fp16 configuration, such as ds_configs/zero1_fp16.json"


def findings(precision: str, capability: tuple[int, int], gpu: str) -> tuple[str, str]:
    """Return why a GPU can't compute in a precision, and why it is slow in it; "" where neither is so.

    Args:
        precision: of the run.
        capability: compute capability of the GPU, or the lowest of several.
        gpu: what to call it.
    """
    shown = f"{gpu} has {capability[0]}.{capability[1]}"
    if precision == "bf16" and capability < BF16:
        return f"bf16 needs compute capability {BF16[0]}.{BF16[1]}, and {shown}", ""
    if precision == "fp16" and capability < TENSOR_CORES:
        return "", f"fp16 is slow below compute capability {TENSOR_CORES[0]}.{TENSOR_CORES[1]}, and {shown}"
    return "", ""

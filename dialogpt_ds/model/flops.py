"""How many operations a model's training takes, and how many a device can do: what MFU is made of."""

from dataclasses import dataclass
from typing import Any

import torch

from dialogpt_ds.config.precision import Precision
from dialogpt_ds.matmul import seconds_of_product

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DATA_SHEETS = (
    ("B200", 2_250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("A800", 312e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("V100-PCIE", 112e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)
"""Part of a GPU's name, and its dense half-precision operations per second as NVIDIA's data sheet of it says; the first
that fits holds."""
MEASURED_SECONDS = 0.005
"""A matrix product that takes this long is large enough to measure with."""


@dataclass(frozen=True)
class Flops:
    """What a model's training computes (Chowdhery et al. 2022, PaLM, appendix B), with the head where it is computed:
    at targets alone."""

    body_weights: int
    """Weights without embeddings and head."""
    head_weights: int
    layers: int
    width: int

    def per_step(self, tokens: float, targets: float, row_length: int) -> float:
        """Return the floating-point operations of a forward and a backward pass.

        6 for each weight and token, 12 * layers * width * row_length for attention a token, as if it saw its whole row:
        examples in a row don't see each other, but only kernels for rows of several sequences leave that out. Padding,
        recomputing and the optimizer are no operations of the model.
        """
        attention = 12 * self.layers * self.width * row_length
        return tokens * (6 * self.body_weights + attention) + 6 * targets * self.head_weights


def flops_of(model: Any) -> Flops:
    """Return the arithmetic of a causal language model of transformers, before an engine takes its weights apart."""
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    outside = tables | ({} if head_weight is None else {id(head_weight): head_weight})
    config = model.config.get_text_config()
    return Flops(
        body_weights=sum(p.numel() for p in model.parameters()) - sum(weight.numel() for weight in outside.values()),
        head_weights=0 if head_weight is None else head_weight.numel(),
        layers=getattr(config, "num_hidden_layers", None) or 0,
        width=getattr(config, "hidden_size", None) or 0,
    )


@dataclass(frozen=True)
class DevicePeak:
    """The most that a device can do."""

    operations_per_second: float
    source: str
    """Where the figure is from."""

    def __str__(self) -> str:
        tera = self.operations_per_second / 1e12
        return f"{tera:,.4g} TFLOP/s ({self.source})" if tera >= 1 else f"{tera * 1e3:,.3g} GFLOP/s ({self.source})"


def device_peak(device: torch.device, precision: Precision) -> DevicePeak:
    """Return the peak of a device in a precision: its data sheet's, else that of a large matrix product, measured
    now."""
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        found = peak_by_name(name)
        if found is not None:
            return DevicePeak(found, f"data sheet of {name}")
    return DevicePeak(measured_peak(device, DTYPES[precision]), f"a matrix product in {precision}, measured")


def peak_by_name(name: str) -> float | None:
    """Return the half-precision peak of a GPU of this name, operations per second."""
    # A number must not go on: A100 is no A10.
    return next((peak for part, peak in DATA_SHEETS if part in name and not _goes_on(name, part)), None)


def _goes_on(name: str, part: str) -> bool:
    return name.partition(part)[2][:1].isalnum() and part[-1].isdigit()


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a square matrix product, the best of several, with the size that takes a
    little while."""
    size, best = 128, 0.0
    while True:
        a, b = (
            torch.full((size, size), 0.01, device=device, dtype=dtype) for _ in range(2)
        )  # no random numbers, which are the run's
        a @ b  # the first one also loads code
        seconds = min(seconds_of_product(a, b) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if seconds > MEASURED_SECONDS or size >= 8_192:
            del a, b
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            return best
        size *= 2

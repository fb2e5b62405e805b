"""What GPUs and the links between them can do, and which part of it programs reach: every constant of the cost
model."""

from dataclasses import dataclass

from dialogpt_ds.config.arguments import Link
from dialogpt_ds.errors import UserError
from dialogpt_ds.hardware import GIB

Capability = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Figures of NVIDIA's data sheets and architecture papers, but for `memory` and the shares."""

    name: str
    capability: Capability
    """Compute capability."""
    half: float
    """Operations a second of Tensor Cores in fp16 (bf16 from 8.0 on), sums in fp32, without sparsity."""
    single: float
    """Operations a second in fp32, without TF32."""
    bandwidth: float
    """Bytes a second of its memory."""
    memory: float
    """Bytes that programs get: what torch reports as total memory, less than the name says where ECC and the driver
    take theirs."""
    pcie: float
    """Bytes a second to the host, in one direction."""
    nvlink: float = 0.0
    """Bytes a second to the other GPUs of its host, in one direction; 0: it has none."""
    clock_share: float = 1.0
    """Share of the peak's clock that its power allows for long."""


GPUS = (
    # The SXM parts.
    Gpu("H100", (9, 0), 989e12, 67e12, 3.35e12, 79.1 * GIB, 64e9, 450e9),
    Gpu("H200", (9, 0), 989e12, 67e12, 4.8e12, 139.8 * GIB, 64e9, 450e9),
    Gpu("A100-40", (8, 0), 312e12, 19.5e12, 1.555e12, 39.4 * GIB, 32e9, 300e9),
    Gpu("A100-80", (8, 0), 312e12, 19.5e12, 2.039e12, 79.2 * GIB, 32e9, 300e9),
    # Of 16 GB; there is one of 32, too.
    Gpu("V100", (7, 0), 125e12, 15.7e12, 0.9e12, 15.8 * GIB, 16e9, 150e9),
    # 70 and 72 W: under load both run below the clock that the peak is for (an assumption).
    Gpu("T4", (7, 5), 65e12, 8.1e12, 0.32e12, 14.6 * GIB, 16e9, clock_share=0.6),
    Gpu("L4", (8, 9), 121e12, 30.3e12, 0.3e12, 22.0 * GIB, 32e9, clock_share=0.75),
    Gpu("RTX 3090", (8, 6), 71e12, 35.6e12, 0.936e12, 23.6 * GIB, 32e9),
    Gpu("RTX 4090", (8, 9), 165e12, 82.6e12, 1.008e12, 23.5 * GIB, 32e9),
)

# Shares of the data sheets that kernels reach, one of each kind for all GPUs. The first two and BANDWIDTH_SHARE were
# chosen so that published figures (calibration.py) lie around what is modelled: kernels written for the purpose (llm.c)
# above it, PyTorch programs (llm-foundry, litgpt, nanoGPT) at it or below. Those for fp32, for links, and for the
# kernel that reads a mask were fitted to nothing.
MATRIX_SHARE = 0.65
"""Of the peak in half precision: matrix products of the sizes that these models have (large ones reach 0.8 on an A100,
0.7 on an H100)."""
FLASH_SHARE = 0.3
"""The same for FlashAttention-2 with heads of 64 (Dao 2023, figures 4 to 7: 0.3 to 0.5 forward, less backward and on an
H100)."""
MASKED_SHARE = 0.15
"""The same for the memory-efficient kernel, which is for Tensor Cores of 8.0 at most, and reads a mask."""
SINGLE_SHARE = 0.8
"""Of the peak in fp32: matrix products and attention."""
BANDWIDTH_SHARE = 0.75
"""Of the memory's bandwidth: PyTorch's kernels that read and write large tensors in order."""
LINK_SHARE = 0.8
"""Of a link's bandwidth: NCCL's rings."""
UNALIGNED = 3.0
"""How many times slower a matrix product in half precision is whose rows don't begin at multiples of 16 bytes."""
KERNEL_SECONDS = 3e-6
"""The least that a kernel takes, with the gap before it."""
FLASH_TILE = (128, 64)
"""Queries and keys that FlashAttention computes together: shorter examples cost as much as these."""

# The host's side: half of what forward and backward passes of this code take a call on a slow CPU core (23 to 29
# microseconds).
LAUNCH_SECONDS = 12e-6
"""Host time of an operation that is launched by PyTorch."""
COMPILED_LAUNCH_SECONDS = 5e-6
"""The same in a compiled function."""
HOOK_SECONDS = 20e-6
"""Host time of DeepSpeed for each parameter's gradient."""
GATHER_SECONDS = 50e-6
"""Host time of DeepSpeed for each parameter that ZeRO-3 gathers (an assumption)."""
STEP_SECONDS = 1.5e-3
"""A step's time in which the GPU waits for the host: between its last sums and the next step's first kernel."""

# Links and what lies behind them.
ETHERNET = 12.5e9
"""Bytes a second of 100 Gbit/s, for each host, in one direction."""
HOST_BANDWIDTH = 100e9
"""Bytes a second of a host's memory, shared by its GPUs, through which an optimizer on the host goes (an
assumption)."""
COLLECTIVE_SECONDS = 30e-6
"""The least that a collective takes."""
CONTEXT = 0.8 * GIB
"""Bytes that CUDA, cuBLAS and NCCL take on a GPU: 0.5 to 1 GiB."""


def gpu_of(name: str) -> Gpu:
    """Find a GPU by its name, whatever case, spaces, dashes and underscores; raises UserError."""
    found = next((gpu for gpu in GPUS if _plain(gpu.name) == _plain(name)), None)
    if found is None:
        raise UserError(
            f"--gpu {name!r} is none of those whose figures are known here: {', '.join(gpu.name for gpu in GPUS)}"
        )
    return found


def _plain(name: str) -> str:
    plain = "".join(letter for letter in name.lower() if letter.isalnum()).removeprefix("nvidia")
    return plain.removesuffix("gb")


def link_of(gpu: Gpu, hosts: int, wanted: Link = "auto") -> Link:
    """Return the slowest link between the GPUs of a run: `wanted`; auto: Ethernet between hosts, else the GPU's own.

    Raises:
        UserError: the GPU has no such link.
    """
    if wanted == "nvlink" and not gpu.nvlink:
        raise UserError(f"--link nvlink: {gpu.name} has none; give pcie, or leave it out")
    if wanted != "auto":
        return wanted
    return "100gbe" if hosts > 1 else "nvlink" if gpu.nvlink else "pcie"


def link_speed(gpu: Gpu, link: Link) -> float:
    """Return the bytes a second that a ring of GPUs passes on, in one direction."""
    return LINK_SHARE * {"nvlink": gpu.nvlink, "pcie": gpu.pcie, "100gbe": ETHERNET}[link]

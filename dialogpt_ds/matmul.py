"""How fast this machine multiplies matrices."""

import functools
import time
from collections.abc import Callable

import torch

from dialogpt_ds.hardware import CpuRates

TOKENS, WIDTH = 256, 768
"""Of the product that is measured: so many tokens at a projection of the smallest GPT-2, 0.3 GFLOP."""
ROUNDS = 20
MEASURING_SECONDS = 0.3
"""After which no further round is begun: where bf16 is emulated a product may take as long as that."""


@functools.cache
def cpu_rates() -> CpuRates:
    """Return the rates of a matrix product on one core of the CPU; measured once in a process, in a fraction of a
    second.

    On one, since several threads wait for each other, on a machine with other work longer than they compute, and both
    products would seem alike.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measured_rates(seconds_of_product)
    finally:
        torch.set_num_threads(threads)


def measured_rates(seconds_of: Callable[[torch.Tensor, torch.Tensor], float]) -> CpuRates:
    """Return the best rate of each precision among several rounds.

    A list of the CPU's instructions would not do: oneDNN calls bf16 supported where AVX-512 has none for it, and
    emulates it. Others at work on the machine make a product slower, never faster, so the best of several counts, and
    the precisions take turns, so that both see the machine alike.

    Args:
        seconds_of: the time that a product takes.
    """
    for dtype in (torch.float32, torch.bfloat16):
        seconds_of(*_factors(8, 8, dtype))  # loads the library
    factors = {dtype: _factors(TOKENS, WIDTH, dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(factors, float("inf"))
    spent = 0.0
    for _ in range(ROUNDS):
        for dtype, (a, b) in factors.items():
            seconds = seconds_of(a, b)
            spent += seconds
            best[dtype] = min(best[dtype], seconds)
        if spent > MEASURING_SECONDS:
            break
    operations = 2 * TOKENS * WIDTH**2
    return CpuRates(operations / best[torch.float32], operations / best[torch.bfloat16])


def _factors(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    # No random numbers, which are the run's.
    return torch.full((rows, width), 0.01, dtype=dtype), torch.full((width, width), 0.01, dtype=dtype)


def seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return how long one product takes on the factors' device, seconds."""
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    started = time.perf_counter()
    a @ b
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    return time.perf_counter() - started

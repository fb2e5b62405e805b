"""How long a micro-batch would take on a GPU: for each kernel the longest of its arithmetic, its memory traffic, and
its launch.

The roofline model (Williams, Waterman and Patterson 2009), for every operation of a trace. Modelled, not measured: see
gpu_specs for what is assumed, and calibration for how far published figures are from it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dialogpt_ds.model.gpu_specs import (
    BANDWIDTH_SHARE,
    COMPILED_LAUNCH_SECONDS,
    FLASH_SHARE,
    KERNEL_SECONDS,
    LAUNCH_SECONDS,
    MASKED_SHARE,
    MATRIX_SHARE,
    SINGLE_SHARE,
    UNALIGNED,
    Gpu,
)
from dialogpt_ds.model.micro_batch_trace import Call, Trace

Category = Literal["body GEMM", "head GEMM", "attention", "head elementwise", "activation", "norms", "rest"]
ACTIVATIONS = {"gelu", "silu", "relu", "tanh", "pow", "sigmoid"}
LOSS = {"nll", "nll_gradient_", "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"}
PADDING = 64
"""The vocabulary may have been padded by up to this many columns."""


@dataclass(frozen=True)
class MicroBatchCost:
    """A forward and a backward pass on a GPU."""

    by_category: dict[Category, float]
    """Seconds of the GPU, the most first."""
    forward_seconds: float
    """The GPU's for the forward pass alone."""
    num_kernels: int
    num_bytes: int
    """Read from the GPU's memory and written to it."""
    launch_seconds: float
    """Of the host, which prepares the next kernels while the GPU computes."""

    @property
    def gpu_seconds(self) -> float:
        """The GPU's time, if it never waits."""
        return sum(self.by_category.values())

    @property
    def seconds(self) -> float:
        """Time of the slower one of GPU and host."""
        return max(self.gpu_seconds, self.launch_seconds)


def cost_of(trace: Trace, gpu: Gpu, vocabulary: int, compiled: bool = False) -> MicroBatchCost:
    """Add up what a micro-batch's kernels take.

    Args:
        trace: the micro-batch.
        gpu: where.
        vocabulary: columns of the head, by which it is told from the body.
        compiled: whether the body is compiled: what lies between two matrix products or attentions there is one kernel
            then, which reads what it does not make itself, and writes what is read later.
    """
    passes = [trace.forward, trace.backward]
    if compiled:
        passes = [_fused(calls, trace.calls, vocabulary) for calls in passes]
    by_category: dict[Category, float] = defaultdict(float)
    seconds = []
    for calls in passes:
        times = [(category_of(call, vocabulary), seconds_of(call, gpu)) for call in calls]
        for category, time in times:
            by_category[category] += time
        seconds.append(sum(time for _, time in times))
    calls = [call for some in passes for call in some]
    launch = COMPILED_LAUNCH_SECONDS if compiled else LAUNCH_SECONDS
    most_first = dict(sorted(by_category.items(), key=lambda item: -item[1]))
    return MicroBatchCost(
        most_first, seconds[0], len(calls), sum(call.num_bytes for call in calls), launch * len(calls)
    )


def seconds_of(call: Call, gpu: Gpu) -> float:
    """Return the longest of a kernel's arithmetic, its memory traffic, and the least that a kernel takes."""
    return max(_arithmetic_seconds(call, gpu), call.num_bytes / (gpu.bandwidth * BANDWIDTH_SHARE), KERNEL_SECONDS)


def _arithmetic_seconds(call: Call, gpu: Gpu) -> float:
    peak = gpu.clock_share * (gpu.single if call.dtype == torch.float32 else gpu.half)
    if call.dtype == torch.float32:
        share = SINGLE_SHARE
    elif "varlen" in call.name or "flash" in call.name:
        share = FLASH_SHARE
    elif "attention" in call.name:
        share = MASKED_SHARE
    else:
        share = MATRIX_SHARE if call.aligned else MATRIX_SHARE / UNALIGNED
    return call.operations / (peak * share)


def category_of(call: Call, vocabulary: int) -> Category:
    """Return what a call belongs to."""
    of_head = any(vocabulary <= size < vocabulary + PADDING for shape in call.shapes for size in shape)
    if "attention" in call.name or "attn" in call.name:
        return "attention"
    if call.operations:
        return "head GEMM" if of_head else "body GEMM"
    if call.name in LOSS or (of_head and not call.name.startswith("embedding")):
        return "head elementwise"
    if call.name.removesuffix("_backward") in ACTIVATIONS:
        return "activation"
    return "norms" if "norm" in call.name else "rest"


def _fused(calls: Sequence[Call], all_calls: Sequence[Call], vocabulary: int) -> list[Call]:
    """Return the calls with each run of the body's that are neither product nor attention as one."""
    last_read = {number: place for place, call in enumerate(all_calls) for number, _ in call.reads}
    place_of = {id(call): place for place, call in enumerate(all_calls)}
    found = []
    for run in _runs(calls, vocabulary):
        if len(run) == 1:
            found.append(run[0])
            continue
        end = place_of[id(run[-1])]
        made = {number for call in run for number, _ in call.writes}
        read = {number: size for call in run for number, size in call.reads if number not in made}
        # What nothing reads is a result, such as a weight's gradient.
        kept = {n: size for call in run for n, size in call.writes if last_read.get(n, end + 1) > end}
        shapes = tuple(shape for call in run for shape in call.shapes)
        name = max(run, key=lambda call: call.num_bytes).name
        found.append(
            Call(
                name,
                shapes,
                run[0].dtype,
                0.0,
                tuple(read.items()),
                tuple(kept.items()),
                run[0].devices,
                run[0].aligned,
            )
        )
    return found


def _runs(calls: Sequence[Call], vocabulary: int) -> Iterator[list[Call]]:
    """Yield the calls in their order: alone those that stay alone, together those between them."""
    run: list[Call] = []
    for call in calls:
        if category_of(call, vocabulary) in ("activation", "norms", "rest"):
            run.append(call)
            continue
        if run:
            yield run
        run = []
        yield [call]
    if run:
        yield run

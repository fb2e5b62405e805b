"""How long an optimizer step would take on several GPUs: micro-batches, communication, the optimizer's pass, and the
host between them."""

from dataclasses import dataclass

from dialogpt_ds.config.arguments import Link
from dialogpt_ds.model.gpu_specs import (
    BANDWIDTH_SHARE,
    COLLECTIVE_SECONDS,
    GATHER_SECONDS,
    HOOK_SECONDS,
    HOST_BANDWIDTH,
    LINK_SHARE,
    STEP_SECONDS,
    Gpu,
    link_speed,
)
from dialogpt_ds.model.memory import Layout
from dialogpt_ds.model.roofline import MicroBatchCost

ADAM_BYTES = 28
"""Adam reads gradient, weight and two moments in fp32, and writes all but the gradient."""
HALF_BYTES = 24
"""Besides, in half precision: the gradient is copied to fp32 (6), checked (2), its norm taken (4), unscaled (8), the
weight copied (4)."""
SINGLE_BYTES = 12
"""Besides, in fp32: the gradient's norm (4), and clipping it (8)."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of an optimizer step, by what takes them."""

    micro_batches: float
    """All of them, on the GPU."""
    waiting_for_host: float
    """What the host takes longer to launch them."""
    communication: float
    """That nothing else hides."""
    optimizer: float
    between_steps: float

    @property
    def seconds(self) -> float:
        """All together."""
        return self.micro_batches + self.waiting_for_host + self.communication + self.optimizer + self.between_steps


def step_cost(layout: Layout, gpu: Gpu, link: Link, cost: MicroBatchCost) -> StepCost:
    """Put a step together from its micro-batches' cost."""
    host = cost.launch_seconds + layout.num_tensors * (
        HOOK_SECONDS + (3 * GATHER_SECONDS if layout.stage == 3 else 0.0)
    )
    return StepCost(
        layout.accumulation * cost.gpu_seconds,
        layout.accumulation * max(host - cost.gpu_seconds, 0.0),
        _communication(layout, link_speed(gpu, link), cost) if layout.gpus > 1 else 0.0,
        _optimizer(layout, gpu),
        STEP_SECONDS,
    )


def _communication(layout: Layout, speed: float, cost: MicroBatchCost) -> float:
    """Return the seconds of communication that computing does not hide.

    DeepSpeed's stages 0 to 2 reduce gradients by all-reduce, which is a reduce-scatter and an all-gather of all
    gradients; stages 0 and 1 once a step, stage 2 once a micro-batch. Stages 1 and 2 gather the updated weights; stage
    3 gathers them in each pass instead.
    """
    share = (layout.gpus - 1) / layout.gpus / speed
    weights = layout.size * layout.num_parameters * share
    gradients = (4 if layout.sends_fp32 else layout.size) * layout.num_parameters * share
    if layout.stage == 3:
        # The third of the tensors that are matrices is gathered, twice, and reduced; the others stay.
        sent = layout.accumulation * (2 * weights + gradients + layout.num_tensors * COLLECTIVE_SECONDS)
        return max(sent - layout.accumulation * cost.gpu_seconds, 0.0) if layout.overlaps else sent
    times = layout.accumulation if layout.stage == 2 else 1
    reduced = 2 * gradients + -(-layout.num_parameters // layout.bucket) * COLLECTIVE_SECONDS
    last = reduced * layout.ready_last / layout.num_parameters
    backward = cost.gpu_seconds - cost.forward_seconds
    exposed = max(reduced - backward, last) if layout.overlaps else reduced
    return times * exposed + (weights + COLLECTIVE_SECONDS if layout.stage else 0.0)


def _optimizer(layout: Layout, gpu: Gpu) -> float:
    """Return the seconds of the optimizer's passes over gradients and states, and of adding up micro-batches'
    gradients."""
    speed = gpu.bandwidth * BANDWIDTH_SHARE
    mine = layout.num_parameters / (layout.gpus if layout.stage else 1)
    adding = (
        (layout.accumulation - 1) * (10 if layout.sums_in_fp32 else 3 * layout.size) * layout.num_parameters / speed
    )
    other = SINGLE_BYTES if layout.precision == "fp32" else HALF_BYTES
    if layout.optimizer_on_host:
        across = 2 * layout.size * mine / (gpu.pcie * LINK_SHARE)
        return adding + other * mine / speed + across + ADAM_BYTES * mine * layout.gpus_per_host / HOST_BANDWIDTH
    return adding + (other + ADAM_BYTES) * mine / speed

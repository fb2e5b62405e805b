"""How long an optimizer step would take on several GPUs: micro-batches, communication, the optimizer's pass, and the host between them."""

from dataclasses import dataclass

from dialogpt_ds.config.precision import Precision
from dialogpt_ds.model.gpu_specs import (
    BANDWIDTH_SHARE,
    COLLECTIVE_SECONDS,
    GATHER_SECONDS,
    GIB,
    HOOK_SECONDS,
    HOST_BANDWIDTH,
    LINK_SHARE,
    STEP_SECONDS,
    Gpu,
    Link,
    link_speed,
)
from dialogpt_ds.model.roofline import MicroBatchCost

ADAM_BYTES = 28
"""Adam reads gradient, weight and two moments in fp32, and writes all but the gradient."""
HALF_BYTES = 24
"""Besides, in half precision: the gradient is copied to fp32 (6), checked and its norm taken (6), unscaled (8), the weight copied back (4)."""
SINGLE_BYTES = 12
"""Besides, in fp32: the gradient's norm (4), and clipping it (8)."""


@dataclass(frozen=True)
class StepPlan:
    """What a step's time depends on besides its micro-batches."""

    gpu: Gpu
    link: Link
    gpus: int
    gpus_per_host: int
    accumulation: int
    stage: int
    """Of ZeRO."""
    overlaps: bool
    """Whether gradients are reduced while the backward pass goes on."""
    optimizer_on_host: bool
    precision: Precision
    num_parameters: int
    num_tensors: int
    """That hold the parameters."""
    bucket: int
    """Numbers that are reduced at a time."""

    @property
    def size(self) -> int:
        """Bytes of a weight, or of a gradient as it is sent."""
        return 4 if self.precision == "fp32" else 2


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


def step_cost(plan: StepPlan, cost: MicroBatchCost) -> StepCost:
    """Put a step together from its micro-batches' cost."""
    host = cost.launch_seconds + plan.num_tensors * (HOOK_SECONDS + (3 * GATHER_SECONDS if plan.stage == 3 else 0.0))
    return StepCost(
        plan.accumulation * cost.gpu_seconds,
        plan.accumulation * max(host - cost.gpu_seconds, 0.0),
        _communication(plan, cost) if plan.gpus > 1 else 0.0,
        _optimizer(plan),
        STEP_SECONDS,
    )


def _communication(plan: StepPlan, cost: MicroBatchCost) -> float:
    """Return the seconds of communication that computing does not hide.

    DeepSpeed's stages 0 to 2 reduce gradients by all-reduce, which is a reduce-scatter and an all-gather of all gradients; stages 0 and 1
    once a step, stage 2 once a micro-batch. Stages 1 and 2 gather the updated weights; stage 3 gathers them in each pass instead.
    """
    whole = plan.size * plan.num_parameters * (plan.gpus - 1) / plan.gpus / link_speed(plan.gpu, plan.link)
    backward = cost.gpu_seconds - cost.forward_seconds
    if plan.stage == 3:
        sent = plan.accumulation * (3 * whole + 3 * COLLECTIVE_SECONDS * plan.num_tensors / 3)
        return max(sent - plan.accumulation * cost.gpu_seconds, 0.0) if plan.overlaps else sent
    buckets = -(-plan.num_parameters // plan.bucket)
    times = plan.accumulation if plan.stage == 2 else 1
    reduced = times * (2 * whole + buckets * COLLECTIVE_SECONDS)
    exposed = max(reduced - times * backward, 0.0) if plan.overlaps else reduced
    return exposed + (whole + COLLECTIVE_SECONDS if plan.stage else 0.0)


def _optimizer(plan: StepPlan) -> float:
    """Return the seconds of the optimizer's passes over gradients and states, and of adding up micro-batches' gradients."""
    speed = plan.gpu.bandwidth * BANDWIDTH_SHARE
    mine = plan.num_parameters / (plan.gpus if plan.stage else 1)
    adding = (plan.accumulation - 1) * 3 * plan.size * plan.num_parameters / speed
    other = SINGLE_BYTES if plan.precision == "fp32" else HALF_BYTES
    if plan.optimizer_on_host:
        across = 2 * plan.size * mine / (plan.gpu.pcie * LINK_SHARE)
        return adding + other * mine / speed + across + ADAM_BYTES * mine * plan.gpus_per_host / HOST_BANDWIDTH
    return adding + (other + ADAM_BYTES) * mine / speed


def buffer_bytes(plan: StepPlan, max_live_parameters: int = 1_000_000_000) -> int:
    """Return the bytes that ZeRO needs on a GPU besides the states: buckets, and the weights that stage 3 has gathered."""
    bucket = plan.size * plan.bucket
    copy_of_bucket = plan.size * min(plan.bucket, plan.num_parameters) if plan.gpus > 1 else 0
    buckets = copy_of_bucket if plan.stage == 0 else bucket * (2 if plan.overlaps else 1) + copy_of_bucket
    gathered = plan.size * min(plan.num_parameters, max_live_parameters) if plan.stage == 3 and plan.gpus > 1 else 0
    return buckets + gathered


def in_gib(number: float) -> str:
    """Return bytes as GiB."""
    return f"{number / GIB:.2f}"

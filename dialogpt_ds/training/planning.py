"""What a run is to be on GPUs that need not be here: its model, its micro-batch on the meta device, and its layout over
them."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dialogpt_ds.errors import UserError
from dialogpt_ds.hardware import device_of_run
from dialogpt_ds.launching.machine_checks import capability_troubles
from dialogpt_ds.model.attention import VARLEN_CAPABILITY, isolation_on
from dialogpt_ds.model.flops import DTYPES, Flops, flops_of
from dialogpt_ds.model.gpu_specs import Capability, Gpu, gpu_of, link_of
from dialogpt_ds.model.loss import Planned
from dialogpt_ds.model.memory import Layout
from dialogpt_ds.model.micro_batch_trace import Trace, planned_loss, trace
from dialogpt_ds.model.probe import head_is_linear
from dialogpt_ds.model.workload import Workload
from dialogpt_ds.order.batches import RankStep
from dialogpt_ds.training.settings import Settings

USUAL_GPUS_PER_HOST = 8
DEEPSPEED_BUCKET = 500_000_000
"""DeepSpeed's own reduce_bucket_size."""


@dataclass(frozen=True)
class Planning:
    """A run's model, looked at while it is whole, and the GPUs that are meant."""

    config: Any
    planned: Planned
    flops: Flops
    num_parameters: int
    num_tensors: int
    num_embedded: int
    """Parameters of the input embedding."""
    gpu: Gpu | None
    """None: no particular one, so that there is memory to be told, but no time."""
    capability: Capability

    @property
    def vocabulary(self) -> int:
        """Token ids of the model."""
        return int(self.config.get_text_config().vocab_size)


def check_gpu(settings: Settings) -> None:
    """Check that the GPU that --gpu names can run what is planned; raises UserError."""
    gpu = gpu_of(settings.arguments.gpu)
    link_of(gpu, hosts_of(settings.world.size)[1], settings.arguments.link)
    for trouble in capability_troubles(settings.precision, gpu.capability, f"--gpu {gpu.name}"):
        if trouble.fatal:
            raise UserError(str(trouble))


def planning_of(settings: Settings, model: Any) -> Planning:
    """Look at a model, in fp32 on the CPU, for the GPU of --gpu, else this machine's, else one of compute capability
    8.0."""
    arguments = settings.arguments
    gpu = gpu_of(arguments.gpu) if arguments.gpu else None
    here = torch.cuda.get_device_capability() if device_of_run() == "cuda" else VARLEN_CAPABILITY
    capability = gpu.capability if gpu else here
    isolation = isolation_on(capability, model, arguments.attention, settings.precision, arguments.dropout)
    parameters = list(model.parameters())
    return Planning(
        model.config,
        Planned(torch.device("cuda"), isolation, head_is_linear(model)),
        flops_of(model),
        sum(parameter.numel() for parameter in parameters),
        len(parameters),
        model.get_input_embeddings().weight.numel(),
        gpu,
        capability,
    )


def workload_of(step: RankStep) -> Workload:
    """Return the shapes of a step's first micro-batch."""
    first = step.micro_batches[0]
    rows, length = first.input_ids.shape
    lengths = tuple(int(number) for number in np.diff(np.asarray(first.example_starts)))
    return Workload(rows, length, len(first.labels), lengths, round(step.num_tokens / len(step.micro_batches)))


def trace_of(settings: Settings, planning: Planning, workload: Workload) -> Trace:
    """Run a micro-batch on the meta device, in the run's precision and with what its GPUs would take."""
    arguments = settings.arguments
    dtype = DTYPES[settings.precision]
    loss = planned_loss(
        planning.config, dtype, planning.planned, arguments.chunked_head, arguments.activation_checkpointing
    )
    return trace(loss, workload, turn_ids=settings.turn_ids)


def layout_of(settings: Settings, planning: Planning) -> Layout:
    """Return how a run is laid out over its GPUs."""
    zero = settings.deepspeed.get("zero_optimization", {})
    stage = settings.zero_stage
    kept_in = (settings.deepspeed.get("data_types") or {}).get("grad_accum_dtype")
    return Layout(
        gpus=settings.world.size,
        gpus_per_host=hosts_of(settings.world.size)[0],
        accumulation=settings.batch.accumulation,
        stage=stage,
        overlaps=bool(zero.get("overlap_comm", stage == 3)),
        optimizer_on_host=settings.offload[0] != "none",
        precision=settings.precision,
        num_parameters=planning.num_parameters,
        num_tensors=planning.num_tensors,
        ready_last=planning.num_embedded,
        sums_in_fp32=settings.precision == "fp32" or kept_in == "fp32",
        sends_fp32=settings.precision == "fp32"
        or "fp32" in (kept_in, settings.deepspeed.get("communication_data_type")),
        bucket=int(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)),
    )


def hosts_of(world_size: int) -> tuple[int, int]:
    """Return the processes on a host, and the number of hosts: of 12 processes at most 8 a host, 6 are on each of
    two."""
    at_most = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or USUAL_GPUS_PER_HOST)
    per_host = max(number for number in range(1, at_most + 1) if world_size % number == 0)
    return per_host, world_size // per_host

"""A run without consequences: everything is built and two steps are taken, in one process, and nothing is written."""

import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from dialogpt_ds.config.batch import BatchSizes
from dialogpt_ds.distributed.world import World, free_port, join_world, leave_world
from dialogpt_ds.errors import in_a_line
from dialogpt_ds.hardware import GIB, device_of_run
from dialogpt_ds.launching.op_folder import build_notice
from dialogpt_ds.model.attention import Isolation
from dialogpt_ds.model.gpu_specs import CONTEXT
from dialogpt_ds.model.memory import (
    States,
    bytes_on_gpu,
    largest_layer,
    model_states,
    peak_of_this_process,
    states_of_run,
)
from dialogpt_ds.model.micro_batch_trace import Trace
from dialogpt_ds.model.workload import Workload
from dialogpt_ds.order.mixture import MixturePosition
from dialogpt_ds.training.data import TrainingData
from dialogpt_ds.training.engine import Engine, model_of, start_engine
from dialogpt_ds.training.forecast import forecast
from dialogpt_ds.training.machine import offload_troubles_here
from dialogpt_ds.training.planning import Planning, hosts_of, layout_of, planning_of, trace_of, workload_of
from dialogpt_ds.training.report import start_table
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.step import train_step

STEPS = 2
HOW: dict[Isolation, str] = {
    "varlen": "varlen attention",
    "flash": "FlashAttention",
    "mask": "attention with a mask",
    "positions": "transformers' attention",
}


def dry_run(settings: Settings) -> None:
    """Print what the run of `settings` would be and need, and take two steps of it.

    The steps are taken by this process alone, with a rank's micro-batches; what depends on the number of processes is
    computed for the number that `settings` has.
    """
    alone, notes = _for_one_process(settings)
    torch.manual_seed(settings.arguments.seed)
    model = model_of(settings)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(start_table(settings, num_parameters, model.config._attn_implementation, "not in a dry run", 0))
    for note in notes:
        print(note)
    states = _states_of(settings, model, num_parameters)
    planning = planning_of(settings, model)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's own store is for all of its processes
    if notice := build_notice(alone.deepspeed, device_of_run() != "cpu"):
        print(notice, file=sys.stderr)
    device = join_world(alone.world)
    engine = data = None
    try:
        engine = start_engine(alone, model)
        data = TrainingData(alone, MixturePosition.start(len(settings.directories)), device)
        taken = _take_steps(alone.turn_ids, engine, data, device)
    finally:
        if data is not None:
            data.close()
        leave_world(engine)
    traced = _traced(settings, planning, taken.workload)
    print(memory_table(states, traced, settings, planning))
    if planning.gpu is not None and traced is not None:
        own = states_of_run(states, settings.zero_stage, settings.offload)
        print(
            forecast(
                settings, planning, traced, None if own is None else memory_on_gpu(own, traced, settings, planning)
            )
        )
    print(f"two steps in one process ({device.type}, {alone.precision}): {'; '.join(taken.lines)}")
    print(
        f"at most {taken.peak_bytes / GIB:.2f} GiB {'on the GPU' if device.type == 'cuda' else 'of memory'} in this "
        "process"
    )
    print("dry run: nothing was written")


def _for_one_process(settings: Settings) -> tuple[Settings, list[str]]:
    """Return the same run for one process, in a precision that this machine has, and what to say about it."""
    from deepspeed.accelerator import get_accelerator

    batch = BatchSizes(settings.batch.micro, settings.batch.accumulation, 1)
    deepspeed = settings.deepspeed | batch.keys()
    notes = []
    zero = deepspeed.get("zero_optimization", {})
    troubles = offload_troubles_here(deepspeed)
    if troubles:
        kept = {name: block for name, block in zero.items() if name not in ("offload_optimizer", "offload_param")}
        deepspeed |= {"zero_optimization": kept}
        notes.append(
            "the steps of the dry run are without offload, which this machine can't do: "
            + "; ".join(map(str, troubles))
        )
    alone = replace(settings, world=World(0, 1, 0), batch=batch, deepspeed=deepspeed)
    if settings.precision == "fp16" and not get_accelerator().is_fp16_supported():
        without = {"fp16": deepspeed["fp16"] | {"enabled": False}}
        note = "fp16: this machine has none, so the steps of the dry run are in fp32; the memory below is fp16's"
        return replace(alone, precision="fp32", deepspeed=deepspeed | without), [*notes, note]
    return alone, notes


def _states_of(settings: Settings, model: Any, num_parameters: int) -> list[States]:
    per_host, hosts = hosts_of(settings.world.size)
    return model_states(num_parameters, largest_layer(model), per_host, hosts, settings.precision)


@dataclass(frozen=True)
class Taken:
    """What the two steps gave."""

    lines: list[str]
    workload: Workload
    """Shapes of a micro-batch."""
    peak_bytes: int


def _take_steps(turn_ids: bool, engine: Engine, data: TrainingData, device: torch.device) -> Taken:
    lines: list[str] = []
    workload = None
    for number in range(1, STEPS + 1):
        step, warnings = data.next_step()
        lines += warnings
        workload = workload or workload_of(step)
        started = time.perf_counter()
        result = train_step(engine, step, device, turn_ids)
        seconds = time.perf_counter() - started
        lines.append(
            f"step {number} loss {result.loss:.4f}, {seconds:.2f} s, {step.num_tokens / seconds:,.0f} tokens/s"
            + ("" if result.applied else ", update skipped (the gradient is not finite)")
        )
    assert workload is not None
    return Taken(lines, workload, peak_of_this_process(device))


def _traced(settings: Settings, planning: Planning, workload: Workload) -> Trace | None:
    try:
        return trace_of(settings, planning, workload)
    except Exception as error:  # of a model whose code asks for numbers, which the device has none of
        print(
            f"this model does not run on PyTorch's device meta ({in_a_line(error)}), so its activations are not counted"
        )
        return None


def memory_on_gpu(state: States, traced: Trace | None, settings: Settings, planning: Planning) -> int:
    """Return the bytes that a run needs on each GPU at a ZeRO stage."""
    return bytes_on_gpu(state, layout_of(settings, planning), traced.peak if traced else 0)


def memory_table(states: list[States], traced: Trace | None, settings: Settings, planning: Planning) -> str:
    """Return what each ZeRO stage needs, a line each, with the memory of a micro-batch, ZeRO's buffers, and CUDA."""
    world, peak = settings.world.size, traced.peak if traced else 0
    own = states_of_run(states, settings.zero_stage, settings.offload)
    width = max(len(state.name) for state in states)
    head = (
        f"memory with {world:,} GPU{'s' * (world != 1)} in {settings.precision}, GiB (weights, gradients and "
        f"optimizer as DeepSpeed "
        f"estimates them; {_micro_batch(traced, settings, planning)}; {CONTEXT / GIB:.1f} are for CUDA and NCCL)"
    )
    lines = [
        head,
        f"  {'':<{width}}  {'each GPU':>9}  {'+ micro-batch':>14}  {'+ buffers, CUDA':>16}  {'each host':>10}",
    ]
    for state in states:
        whole = memory_on_gpu(state, traced, settings, planning)
        alone, both, full, host = (number / GIB for number in (state.device, state.device + peak, whole, state.host))
        mark = " <- this run" if state is own else ""
        lines.append(f"  {state.name:<{width}}  {alone:>9.2f}  {both:>14.2f}  {full:>16.2f}  {host:>10.2f}{mark}")
    if "nvme" in settings.offload:
        lines.append("  (what this run keeps on its NVMe disk takes no memory of the host but for buffers)")
    if own is None:
        lines.append("  (for this run's ZeRO stage with its offload in this precision there is no estimate)")
    return "\n".join(lines)


def _micro_batch(traced: Trace | None, settings: Settings, planning: Planning) -> str:
    """Say what a micro-batch's memory is."""
    if traced is None:
        return "what a micro-batch needs is not counted"
    device = planning.gpu.name if planning.gpu else "a GPU of compute capability {}.{}".format(*planning.capability)
    return (
        f"{settings.batch.micro} rows of {settings.row_length} on {device} with {HOW[planning.planned.isolation]}, by "
        f"the shapes of all tensors: {traced.kept.total() / GIB:.2f} kept for the backward pass, "
        f"{traced.peak / GIB:.2f} at most"
    )

"""A run without consequences: everything is built and two steps are taken, in one process, and nothing is written."""

import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from dialogpt_ds.config.batch import BatchSizes
from dialogpt_ds.config.offload import offload_devices
from dialogpt_ds.launching.op_folder import build_notice
from dialogpt_ds.logs.start_table import start_table
from dialogpt_ds.model.loss import to_tensors
from dialogpt_ds.order.mixture import MixturePosition
from dialogpt_ds.process import device_of_run
from dialogpt_ds.training.data import TrainingData
from dialogpt_ds.training.engine import start_engine, train_step
from dialogpt_ds.training.memory import (
    States,
    activations_measured,
    largest_layer,
    layout_name,
    model_states,
    peak_of_this_process,
)
from dialogpt_ds.training.requirements import offload_problems
from dialogpt_ds.training.settings import Settings, model_of
from dialogpt_ds.training.world import World, free_port, join_world, leave_world

STEPS = 2
USUAL_GPUS_PER_HOST = 8
GIB = 2**30


def dry_run(settings: Settings) -> None:
    """Print what the run of `settings` would be and need, and take two steps of it.

    The steps are taken by this process alone, with a rank's micro-batches; what depends on the number of processes is computed for the
    number that `settings` has.
    """
    alone, notes = _for_one_process(settings)
    torch.manual_seed(settings.arguments.seed)
    model = model_of(settings)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(start_table(settings, num_parameters, model.config._attn_implementation, "not in a dry run", 0))
    for note in notes:
        print(note)
    states = _states_of(settings, model, num_parameters)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's own store is for all of its processes
    if notice := build_notice(alone.deepspeed, device_of_run() != "cpu"):
        print(notice, file=sys.stderr)
    device = join_world(alone.world)
    engine = data = None
    try:
        engine = start_engine(alone, model)
        data = TrainingData(alone, MixturePosition.start(len(settings.directories)), device)
        taken = _take_steps(alone, engine, data, device)
    finally:
        if data is not None:
            data.close()
        leave_world(engine)
    activations = int(taken.activation_bytes * (0.5 if settings.precision == "fp16" and alone.precision == "fp32" else 1.0))
    print(memory_table(states, activations, settings))
    print(f"two steps in one process ({device.type}, {alone.precision}): {'; '.join(taken.lines)}")
    print(f"at most {taken.peak_bytes / GIB:.2f} GiB {'on the GPU' if device.type == 'cuda' else 'of memory'} in this process")
    print("dry run: nothing was written")


def _for_one_process(settings: Settings) -> tuple[Settings, list[str]]:
    """Return the same run for one process, in a precision that this machine has, and what to say about it."""
    from deepspeed.accelerator import get_accelerator

    batch = BatchSizes(settings.batch.micro, settings.batch.accumulation, 1)
    deepspeed = settings.deepspeed | batch.keys()
    notes = []
    zero = deepspeed.get("zero_optimization", {})
    problems = list(offload_problems(zero, get_accelerator()))
    if problems:
        kept = {name: block for name, block in zero.items() if name not in ("offload_optimizer", "offload_param")}
        deepspeed |= {"zero_optimization": kept}
        notes.append("the steps of the dry run are without offload, which this machine can't do: " + "; ".join(problems))
    alone = replace(settings, world=World(0, 1, 0), batch=batch, deepspeed=deepspeed)
    if settings.precision == "fp16" and not get_accelerator().is_fp16_supported():
        without = {"fp16": deepspeed["fp16"] | {"enabled": False}}
        note = "fp16: this machine has none, so the steps of the dry run are in fp32; the memory below is fp16's"
        return replace(alone, precision="fp32", deepspeed=deepspeed | without), [*notes, note]
    return alone, notes


def _states_of(settings: Settings, model: Any, num_parameters: int) -> list[States]:
    world_size = settings.world.size
    at_most = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or USUAL_GPUS_PER_HOST)
    # Of 12 processes at most 8 a host, 6 are on each of two.
    per_host = max(number for number in range(1, at_most + 1) if world_size % number == 0)
    return model_states(num_parameters, largest_layer(model), per_host, world_size // per_host, settings.precision)


@dataclass(frozen=True)
class Taken:
    """What the two steps gave."""

    lines: list[str]
    activation_bytes: int
    """Of one micro-batch."""
    peak_bytes: int


def _take_steps(settings: Settings, engine: Any, data: TrainingData, device: torch.device) -> Taken:
    turn_ids = not settings.arguments.no_token_id
    lines, activation_bytes = [], 0
    for number in range(1, STEPS + 1):
        step, warnings = data.next_step()
        lines += warnings
        if number == 1:
            with activations_measured(engine.module) as saved:
                engine.module(**to_tensors(step.micro_batches[0], device, turn_ids))
            activation_bytes = saved.total
        started = time.perf_counter()
        result = train_step(engine, step, device, turn_ids)
        seconds = time.perf_counter() - started
        lines.append(
            f"step {number} loss {result.loss:.4f}, {seconds:.2f} s, {step.num_tokens / seconds:,.0f} tokens/s"
            + ("" if result.applied else ", update left out (the gradient is not finite)")
        )
    return Taken(lines, activation_bytes, peak_of_this_process(device))


def memory_table(states: list[States], activations: int, settings: Settings) -> str:
    """Return what each ZeRO stage needs, a line each, with the activations of a micro-batch."""
    world, batch = settings.world.size, settings.batch
    width = max(len(state.name) for state in states)
    head = (
        f"memory with {world:,} GPU{'s' * (world != 1)} in {settings.precision}, GiB (weights, gradients and optimizer as DeepSpeed "
        f"estimates them; activations of {batch.micro} rows of {settings.row_length} as measured: {activations / GIB:.2f})"
    )
    lines = [head, f"  {'':<{width}}  {'each GPU':>9}  {'+ activations':>14}  {'each host':>10}"]
    for state in states:
        alone, both, host = (number / GIB for number in (state.device, state.device + activations, state.host))
        mark = " <- this run" if _is_this_run(state, settings) else ""
        lines.append(f"  {state.name:<{width}}  {alone:>9.2f}  {both:>14.2f}  {host:>10.2f}{mark}")
    if "nvme" in offload_devices(settings.deepspeed):
        lines.append("  (what this run keeps on its NVMe disk takes no memory of the host but for buffers)")
    if not any(_is_this_run(state, settings) for state in states):
        lines.append("  (for this run's ZeRO stage with its offload in this precision there is no estimate)")
    return "\n".join(lines)


def _is_this_run(state: States, settings: Settings) -> bool:
    optimizer, weights = (device != "none" for device in offload_devices(settings.deepspeed))
    return state.name == layout_name(settings.zero_stage, optimizer, weights)

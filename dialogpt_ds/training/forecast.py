"""What a run would do on GPUs that are not here, by the cost model, as text."""

from dialogpt_ds.config.arguments import Link
from dialogpt_ds.hardware import GIB
from dialogpt_ds.model.calibration import ERROR
from dialogpt_ds.model.gpu_specs import Gpu, link_of
from dialogpt_ds.model.memory import Layout
from dialogpt_ds.model.micro_batch_trace import Trace
from dialogpt_ds.model.roofline import MicroBatchCost, cost_of
from dialogpt_ds.model.workload import Workload
from dialogpt_ds.training.planning import Planning, hosts_of, layout_of
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.step_cost import StepCost, step_cost

LINK_NAMES: dict[Link, str] = {"nvlink": "NVLink", "pcie": "PCIe", "100gbe": "Ethernet of 100 Gbit/s"}


def forecast(settings: Settings, planning: Planning, traced: Trace, memory: int | None) -> str:
    """Return what the cost model says about the run on the GPUs of --gpu, as lines to print.

    Args:
        settings: of the run.
        planning: with a GPU.
        traced: its micro-batch.
        memory: bytes that the run needs on each GPU; None: not known.
    """
    gpu = planning.gpu
    assert gpu is not None
    layout = layout_of(settings, planning)
    link = link_of(gpu, hosts_of(settings.world.size)[1], settings.arguments.link)
    cost = cost_of(traced, gpu, planning.vocabulary, settings.arguments.torch_compile)
    step = step_cost(layout, gpu, link, cost)
    lines = [
        f"modelled, not measured: {layout.gpus:,} {gpu.name}{f' over {LINK_NAMES[link]}' if layout.gpus > 1 else ''}, "
        f"ZeRO-{layout.stage}, {layout.precision} ({ERROR})",
        _speed_line(settings, planning, traced.workload, step),
        _memory_line(settings, gpu, memory),
        *_category_lines(cost, layout, step),
    ]
    optimizer, weights = settings.offload
    if weights != "none" or optimizer == "nvme":
        lines.append("  (what moves weights to the host, or anything to its NVMe disk, is not in the time)")
    return "\n".join(lines)


def _speed_line(settings: Settings, planning: Planning, workload: Workload, step: StepCost) -> str:
    gpu, gpus, accumulation = planning.gpu, settings.world.size, settings.batch.accumulation
    assert gpu is not None
    each = workload.tokens * accumulation / step.seconds
    operations = planning.flops.per_step(workload.tokens, workload.num_targets, workload.row_length) * accumulation
    peak = gpu.single if settings.precision == "fp32" else gpu.half
    epoch = sum(directory.manifest.totals["tokens"] for directory in settings.directories) / (each * gpus)
    return (
        f"  {each * gpus:,.0f} tokens/s, {each:,.0f} each GPU, MFU {operations / step.seconds / peak:.0%}; a step of "
        f"{step.seconds * 1e3:,.1f} ms; an epoch in {_time(epoch)}"
    )


def _memory_line(settings: Settings, gpu: Gpu, memory: int | None) -> str:
    if memory is None:
        return "  memory: for this run's ZeRO stage with its offload there is no estimate"
    needs = f"  memory: {memory / GIB:.1f} GiB of the {gpu.memory / GIB:.1f} that a program gets on each GPU"
    if memory <= gpu.memory:
        return needs
    arguments, ways = settings.arguments, []
    if settings.batch.micro > 1:
        ways.append("smaller micro-batches (a larger --gradient_accumulation_steps)")
    if not arguments.activation_checkpointing:
        ways.append("--activation_checkpointing")
    if not arguments.chunked_head:
        ways.append("--chunked_head")
    if settings.zero_stage < 3 and settings.world.size > 1:
        ways.append(f"ZeRO-{settings.zero_stage + 1} or higher")
    if settings.offload[0] == "none":
        ways.append("offload (ds_configs/zero2_fp16_offload_optimizer.json)")
    return f"{needs}: IT DOES NOT FIT. Ways out: {', '.join([*ways, 'a smaller --model'])}"


def _category_lines(cost: MicroBatchCost, layout: Layout, step: StepCost) -> list[str]:
    """Return the table of what takes a step's time."""
    rows: list[tuple[str, float]] = [
        (name, layout.accumulation * seconds) for name, seconds in cost.by_category.items()
    ]
    rows += [
        ("waiting for the host", step.waiting_for_host),
        ("communication", step.communication),
        ("optimizer", step.optimizer),
        ("between steps", step.between_steps),
    ]
    width = max(len(name) for name, _ in rows)
    table = [f"  {name:<{width}}  {1e3 * seconds:>9,.2f} ms  {seconds / step.seconds:>4.0%}" for name, seconds in rows]
    launched = f"  {cost.num_kernels:,} kernels and {cost.num_bytes / GIB:,.1f} GiB moved in a micro-batch"
    return [*table, launched]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} hours" if seconds >= 360 else f"{seconds:,.0f} seconds"

"""GPUs: how many and which, whether PyTorch can use them, whether they can do the run's precision and have room for its
states."""

from collections.abc import Mapping
from typing import Any

from dialogpt_ds.config.configuration import Configuration
from dialogpt_ds.doctor.facts import HostFacts, Seen
from dialogpt_ds.doctor.report import Finding, by_host, of_machines, ok, problem, warning
from dialogpt_ds.doctor.run_inputs import ModelSize
from dialogpt_ds.hardware import GIB
from dialogpt_ds.launching.machine_checks import (
    Trouble,
    capability_troubles,
    count_troubles,
    device_troubles,
    offload_troubles,
    why_unused,
)
from dialogpt_ds.launching.needed_ops import ASYNC_IO

GPUS, CUDA, PRECISION, FIT = "gpus", "cuda", "precision", "fit"
IN_USE = 0.05
"""Share of a GPU's memory that others have taken, above which it is said."""
TIGHT = 0.8
"""Share of the memory above which the states leave little for activations and buffers."""


def gpu_findings(seen: Seen, ranks: Mapping[str, int], num_given: bool) -> list[Finding]:
    """Compare the hosts' GPUs with the processes that would be on them.

    Args:
        seen: the hosts.
        ranks: processes on each host.
        num_given: whether somebody has said how many.
    """
    found: list[Finding] = []
    with_gpus = [(name, facts) for name, facts in seen if facts.on_gpu]
    without = [name for name, facts in seen if not facts.on_gpu]
    if with_gpus and without:
        texts = by_host((name, "no GPU that PyTorch can use, and the other hosts have some") for name in without)
        found += [problem(GPUS, text, "take it out of the hostfile, or see the line cuda") for text in texts]
    few = [(name, trouble) for name, facts in with_gpus for trouble in count_troubles(ranks[name], facts.num_visible)]
    idle = [(name, f"{ranks[name]} processes for {_gpus(facts.num_visible)}, so some are not "
                   f"used") for name, facts in with_gpus
            if num_given and ranks[name] < facts.num_visible]  # fmt: skip
    found += of_machines(GPUS, few)
    found += [warning(GPUS, text) for text in by_host(idle)]
    taken = [(name, text) for name, facts in with_gpus for text in _taken(facts)]
    found += [
        warning(GPUS, text, "nvidia-smi shows by whom; ends of runs that were killed may be left")
        for text in by_host(taken)
    ]
    kinds = by_host((name, _kinds(facts)) for name, facts in with_gpus)
    if len(kinds) > 1:
        found.append(warning(GPUS, "hosts with different GPUs train at the pace of the slowest: " + "; ".join(kinds)))
    return found or [ok(GPUS, kinds[0] if kinds else _on_cpu(seen, ranks))]


def _on_cpu(seen: Seen, ranks: Mapping[str, int]) -> str:
    cpus = by_host(
        (name, f"{ranks[name]} process{'es' * (ranks[name] != 1)} on {facts.cpus} cores") for name, facts in seen
    )
    return f"no GPU: a run on CPUs (gloo), {'; '.join(cpus)}"


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number != 1)}"


def _kinds(facts: HostFacts) -> str:
    """Return a host's GPUs, equal ones counted: 8 x NVIDIA A100-SXM4-80GB (80 GiB, capability 8.0), driver 550.54."""
    named = [f"{gpu.name} ({gpu.memory / GIB:.0f} GiB, capability {gpu.capability or '?'})" for gpu in facts.gpus]
    counted = ", ".join(f"{named.count(name)} x {name}" for name in dict.fromkeys(named))
    driver = next((gpu.driver for gpu in facts.gpus if gpu.driver), "")
    return (counted or _gpus(facts.num_visible)) + (f", driver {driver}" if driver else "")


def _taken(facts: HostFacts) -> list[str]:
    texts = [f"GPU {number} has {gpu.used / GIB:.1f} of {gpu.memory / GIB:.0f} GiB in use already"
             for number, gpu in enumerate(facts.gpus) if gpu.memory and gpu.used > IN_USE * gpu.memory]  # fmt: skip
    return ["; ".join(texts)] if texts else []


def cuda_findings(seen: Seen) -> list[Finding]:
    """Hold the driver against the CUDA that PyTorch was built with."""
    found: list[Finding] = []
    unused, old, foreign, good = [], [], [], []
    for name, facts in seen:
        has_gpus = bool(facts.num_pci_gpus or facts.num_device_files or facts.gpus)
        if facts.cpu_is_meant and has_gpus:
            good.append((name, "GPUs are not used, as DS_ACCELERATOR or CUDA_VISIBLE_DEVICES in the environment says"))
        elif not facts.num_visible and has_gpus:
            why = why_unused(
                max(facts.num_pci_gpus, len(facts.gpus)), max(facts.num_device_files, len(facts.gpus)), facts.torch_cuda
            )
            unused.append((name, why + (f"\nPyTorch says: {facts.torch_error}" if facts.torch_error else "")))
        elif facts.num_visible:
            good.append((name, _fitting(facts)))
            foreign += [(name, text) for text in _foreign(facts)]
        if has_gpus and facts.torch_cuda and _major(facts.driver_cuda) < _major(facts.torch_cuda):
            old.append(
                (name, f"the driver runs CUDA up to {facts.driver_cuda}, PyTorch is built for {facts.torch_cuda}")
            )
    found += [problem(CUDA, text) for text in by_host(unused)]
    way_out = "install a newer driver, or a PyTorch that was built for an older CUDA"
    found += [problem(CUDA, text, way_out) for text in by_host(old)]
    found += [problem(CUDA, text, "install a PyTorch build for this GPU") for text in by_host(foreign)]
    return found or [ok(CUDA, "; ".join(by_host(good)) or "not used: there is no NVIDIA GPU")]


def _fitting(facts: HostFacts) -> str:
    if facts.torch_cuda is None:
        return "PyTorch is built for ROCm"
    return f"PyTorch is built for CUDA {facts.torch_cuda}, the driver runs up to {facts.driver_cuda or '?'}"


def _major(version: str) -> int:
    """Return the first number; a driver runs what was built for any CUDA of its major version. Unknown ones are no
    reason to complain."""
    return int(version.split(".")[0]) if version else 1_000


def _foreign(facts: HostFacts) -> list[str]:
    """Return GPUs that PyTorch has no code for: it runs what was built for the same major architecture and a smaller
    minor one."""
    built = [_numbers(name.rpartition("_")[2].rstrip("af")) for name in facts.architectures if name.startswith("sm_")]
    newest = max(
        (_numbers(name.rpartition("_")[2]) for name in facts.architectures if name.startswith("compute_")), default=None
    )
    texts = []
    for gpu in facts.gpus:
        own = capability_of(gpu.capability)
        if own is None or not built or any(major == own[0] and minor <= own[1] for major, minor in built):
            continue
        if newest is None or newest > own:
            texts.append(
                f"PyTorch has no code for {gpu.name} (capability {gpu.capability}); it was built for "
                f"{', '.join(facts.architectures)}"
            )
    return list(dict.fromkeys(texts))


def _numbers(digits: str) -> tuple[int, int]:
    """Return 80 as (8, 0), 120 as (12, 0)."""
    return (int(digits[:-1]), int(digits[-1])) if digits.isdigit() and len(digits) > 1 else (1_000, 0)


def capability_of(text: str) -> tuple[int, int] | None:
    """Return a compute capability as numbers."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def precision_findings(seen: Seen, precision: str, deepspeed: dict[str, Any]) -> list[Finding]:
    """Return where the run's precision, or its offload to NVMe, can't be had, or is slow."""
    found = []
    for name, facts in seen:
        asked = requirement_troubles(facts, precision, deepspeed.get("zero_optimization") or {})
        refused = [trouble.text for trouble in asked if trouble.fatal]
        found += [(name, Trouble("\n".join(refused)))] if refused else []
        found += [(name, trouble) for trouble in asked if not trouble.fatal]
        lowest = (
            min((c for gpu in facts.gpus if (c := capability_of(gpu.capability))), default=None)
            if facts.on_gpu
            else None
        )
        if lowest is not None and not refused:
            found += [(name, trouble) for trouble in capability_troubles(precision, lowest, "a GPU there")]
    if found or not any("requirements" not in facts.failures for _, facts in seen):
        return of_machines(PRECISION, found)  # what could not be looked at is said elsewhere
    return [ok(PRECISION, f"{precision} works {'on every host' if len(seen) > 1 else 'here'}")]


def requirement_troubles(facts: HostFacts, precision: str, zero: dict[str, Any]) -> list[Trouble]:
    """Return what a host's device, disks and libraries lack for the precision and the offload of a run."""
    async_io = facts.ops_compatible.get(ASYNC_IO, True)
    return [*device_troubles(precision, facts.device), *offload_troubles(zero, facts.nvme_folders, async_io)]


def fit_findings(seen: Seen, ranks: Mapping[str, int], configuration: Configuration, size: ModelSize) -> list[Finding]:
    """Hold the states of the run's ZeRO stage against the memory of its GPUs, or of its hosts on CPUs."""
    from dialogpt_ds.model.memory import model_states, name_of_run, states_of_run

    name = name_of_run(configuration.zero_stage, configuration.offload)
    states = model_states(
        size.num_parameters, size.largest_layer, max(ranks.values()), len(ranks), configuration.precision
    )
    state = states_of_run(states, configuration.zero_stage, configuration.offload)
    if state is None:
        return [
            ok(FIT, f"for {name} in {configuration.precision} there is no estimate; --dry_run takes two real steps")
        ]
    on_disk = "nvme" in configuration.offload
    wrong, tight = [], []
    for host, facts in seen:
        problems, warnings = _fit_on_host(
            facts, ranks[host], state.device, state.in_host_memory(ranks[host], facts.on_gpu, on_disk)
        )
        wrong += [(host, text) for text in problems]
        tight += [(host, text) for text in warnings]
    means = f"{size.num_parameters / 1e6:,.0f} million parameters in {name}, {configuration.precision}"
    way_out = (
        "more processes with ZeRO-2 or 3 (ds_configs/zero3_fp16.json), offload "
        "(ds_configs/zero2_fp16_offload_optimizer.json), a smaller --model; --dry_run shows all stages"
    )
    found = [problem(FIT, f"{text} ({means})", way_out) for text in by_host(wrong)]
    found += [warning(FIT, f"{text} ({means})", "--activation_checkpointing, --chunked_head, smaller micro-batches; "
                                                "--dry_run counts "
                      "the activations") for text in by_host(tight)]  # fmt: skip
    where = "on each GPU" if any(facts.on_gpu for _, facts in seen) else "for each process"
    shown = f"weights, gradients and optimizer take {state.device / GIB:,.2f} GiB {where} ({means})"
    return found or [ok(FIT, shown + "; activations come on top, --dry_run counts them")]


def _fit_on_host(facts: HostFacts, ranks: int, device: int, host: int) -> tuple[list[str], list[str]]:
    """Return what does not fit on a host, and what only just does.

    Args:
        facts: of the host.
        ranks: processes on it.
        device: bytes of the states on each GPU.
        host: bytes in the host's memory, of all of them.
    """
    problems, warnings = [], []
    total, available = facts.memory
    if facts.on_gpu:
        smallest = min((gpu.memory for gpu in facts.gpus if gpu.memory), default=0)
        free = min((gpu.memory - gpu.used for gpu in facts.gpus if gpu.memory), default=0)
        text = (
            f"weights, gradients and optimizer take {device / GIB:,.1f} GiB on each GPU, and the smallest has "
            f"{smallest / GIB:,.1f}"
        )
        if smallest and device > smallest:
            problems.append(text)
        elif smallest and device > TIGHT * free:
            warnings.append(f"{text}, of which {free / GIB:,.1f} are free")
    what = "building the model and for what is kept there" if facts.on_gpu else "weights, gradients and optimizer"
    text = (
        f"{ranks} processes need {host / GIB:,.1f} GiB of the host's memory for {what}, and it has {total / GIB:,.1f}"
    )
    if host > total:
        problems.append(text)
    elif host > TIGHT * available:
        warnings.append(f"{text}, of which {available / GIB:,.1f} are free")
    return problems, warnings

"""Memory: whether weights, gradients and optimizer of the run fit on each host, by the estimates of --dry_run."""

from collections.abc import Mapping, Sequence

from dialogpt_ds.config.offload import offload_devices
from dialogpt_ds.doctor.configuration import Configuration
from dialogpt_ds.doctor.facts import HostFacts
from dialogpt_ds.doctor.finding import Finding, by_host, ok, problem, warning
from dialogpt_ds.doctor.run_inputs import ModelSize
from dialogpt_ds.hardware import GIB

FIT = "fit"
TIGHT = 0.8
"""Share of the memory above which the states leave little for activations and buffers."""


def fit_findings(
    seen: Sequence[tuple[str, HostFacts]], ranks: Mapping[str, int], configuration: Configuration, size: ModelSize
) -> list[Finding]:
    """Hold the states of the run's ZeRO stage against the memory of its GPUs, or of its hosts on CPUs."""
    from dialogpt_ds.model.memory import layout_name, model_states

    optimizer, weights = offload_devices(configuration.deepspeed)
    name = layout_name(configuration.zero_stage, optimizer != "none", weights != "none")
    states = model_states(size.num_parameters, size.largest_layer, max(ranks.values()), len(ranks), configuration.precision)
    state = next((state for state in states if state.name == name), None)
    if state is None:
        return [ok(FIT, f"for {name} in {configuration.precision} there is no estimate; --dry_run takes two real steps")]
    on_disk = "nvme" in (optimizer, weights)
    wrong, tight = [], []
    for host, facts in seen:
        problems, warnings = _host_findings(facts, ranks[host], state.device, 0 if on_disk else state.host)
        wrong += [(host, text) for text in problems]
        tight += [(host, text) for text in warnings]
    means = f"{size.num_parameters / 1e6:,.0f} million parameters in {name}, {configuration.precision}"
    way_out = (
        "more processes with ZeRO-2 or 3 (ds_configs/zero3_fp16.json), offload (ds_configs/zero2_fp16_offload_optimizer.json), a smaller "
        "--model; --dry_run shows all stages"
    )
    found = [problem(FIT, f"{text} ({means})", way_out) for text in by_host(wrong)]
    found += [warning(FIT, f"{text} ({means})", "--activation_checkpointing, --chunked_head, smaller micro-batches; --dry_run counts "
                      "the activations") for text in by_host(tight)]  # fmt: skip
    where = "on each GPU" if any(facts.on_gpu for _, facts in seen) else "for each process"
    shown = f"weights, gradients and optimizer take {state.device / GIB:,.2f} GiB {where} ({means})"
    return found or [ok(FIT, shown + "; activations come on top, --dry_run counts them")]


def _host_findings(facts: HostFacts, ranks: int, device: int, host: int) -> tuple[list[str], list[str]]:
    """Return what does not fit on a host, and what only just does.

    Args:
        facts: of the host.
        ranks: processes on it.
        device: bytes of the states on each GPU.
        host: bytes in the host's memory, of all processes.
    """
    problems, warnings = [], []
    total, available = facts.memory
    if facts.on_gpu:
        smallest = min((gpu.memory for gpu in facts.gpus if gpu.memory), default=0)
        free = min((gpu.memory - gpu.used for gpu in facts.gpus if gpu.memory), default=0)
        text = (
            f"weights, gradients and optimizer take {device / GIB:,.1f} GiB on each GPU, and the smallest has {smallest / GIB:,.1f}"
        )
        if smallest and device > smallest:
            problems.append(text)
        elif smallest and device > TIGHT * free:
            warnings.append(f"{text}, of which {free / GIB:,.1f} are free")
        needed, what = host, "building the model and for what is kept there"
    else:
        needed, what = max(host, device * ranks), "weights, gradients and optimizer"
    text = f"{ranks} processes need {needed / GIB:,.1f} GiB of the host's memory for {what}, and it has {total / GIB:,.1f}"
    if needed > total:
        problems.append(text)
    elif needed > TIGHT * available:
        warnings.append(f"{text}, of which {available / GIB:,.1f} are free")
    return problems, warnings

"""GPUs: how many and which, whether PyTorch can use them, whether they can compute in the run's precision."""

from collections.abc import Mapping

from dialogpt_ds.doctor.facts import HostFacts, Seen
from dialogpt_ds.doctor.finding import Finding, by_host, ok, problem, warning
from dialogpt_ds.hardware import GIB
from dialogpt_ds.launching import gpu_precision
from dialogpt_ds.launching.nvidia import why_unused

GPUS, CUDA, PRECISION = "gpus", "cuda", "precision"
IN_USE = 0.05
"""Share of a GPU's memory that others have taken, above which it is said."""


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
    few, idle = [], []
    for name, facts in with_gpus:
        if ranks[name] > facts.num_visible:
            few.append((name, f"{ranks[name]} processes, but {_gpus(facts.num_visible)}"))
        elif num_given and ranks[name] < facts.num_visible:
            idle.append((name, f"{ranks[name]} processes for {_gpus(facts.num_visible)}, so some are not used"))
    found += [problem(GPUS, text, "slots= in the hostfile, or --num_gpus, is at most the number of GPUs") for text in by_host(few)]
    found += [warning(GPUS, text) for text in by_host(idle)]
    taken = [(name, text) for name, facts in with_gpus for text in _taken(facts)]
    found += [warning(GPUS, text, "nvidia-smi shows by whom; ends of runs that were killed may be left") for text in by_host(taken)]
    kinds = by_host((name, _kinds(facts)) for name, facts in with_gpus)
    if len(kinds) > 1:
        found.append(warning(GPUS, "hosts with different GPUs train at the pace of the slowest: " + "; ".join(kinds)))
    return found or [ok(GPUS, kinds[0] if kinds else _on_cpu(seen, ranks))]


def _on_cpu(seen: Seen, ranks: Mapping[str, int]) -> str:
    cpus = by_host((name, f"{ranks[name]} process{'es' * (ranks[name] != 1)} on {facts.cpus} cores") for name, facts in seen)
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
            old.append((name, f"the driver runs CUDA up to {facts.driver_cuda}, PyTorch is built for {facts.torch_cuda}"))
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
    """Return the first number; a driver runs what was built for any CUDA of its major version. Unknown ones are no reason to complain."""
    return int(version.split(".")[0]) if version else 1_000


def _foreign(facts: HostFacts) -> list[str]:
    """Return GPUs that PyTorch has no code for: it runs what was built for the same major architecture and a smaller minor one."""
    built = [_numbers(name.rpartition("_")[2].rstrip("af")) for name in facts.architectures if name.startswith("sm_")]
    newest = max((_numbers(name.rpartition("_")[2]) for name in facts.architectures if name.startswith("compute_")), default=None)
    texts = []
    for gpu in facts.gpus:
        own = capability_of(gpu.capability)
        if own is None or not built or any(major == own[0] and minor <= own[1] for major, minor in built):
            continue
        if newest is None or newest > own:
            texts.append(
                f"PyTorch has no code for {gpu.name} (capability {gpu.capability}); it was built for {', '.join(facts.architectures)}"
            )
    return list(dict.fromkeys(texts))


def _numbers(digits: str) -> tuple[int, int]:
    """Return 80 as (8, 0), 120 as (12, 0)."""
    return (int(digits[:-1]), int(digits[-1])) if digits.isdigit() and len(digits) > 1 else (1_000, 0)


def capability_of(text: str) -> tuple[int, int] | None:
    """Return a compute capability as numbers."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def precision_findings(seen: Seen, precision: str) -> list[Finding]:
    """Return where the run's precision, or its offload, can't be had; as the trainer itself would say it there."""
    refused = by_host((name, facts.requirement_problem) for name, facts in seen if facts.requirement_problem)
    found = [problem(PRECISION, text) for text in refused]
    warned = [(name, facts.requirement_warning.removeprefix("warning: ")) for name, facts in seen if facts.requirement_warning]
    found += [warning(PRECISION, text) for text in by_host(warned)]
    lacking, slow = [], []
    for name, facts in seen:
        lowest = min((c for gpu in facts.gpus if (c := capability_of(gpu.capability))), default=None) if facts.on_gpu else None
        if lowest is None or facts.requirement_problem:
            continue
        refusal, slowness = gpu_precision.findings(precision, lowest, "a GPU there")
        lacking += [(name, refusal)] if refusal else []
        slow += [(name, slowness)] if slowness else []
    found += [problem(PRECISION, text, gpu_precision.FP16_CONFIGURATION) for text in by_host(lacking)]
    found += [warning(PRECISION, text) for text in by_host(slow)]
    if found or not any("requirements" not in facts.failures for _, facts in seen):
        return found  # what could not be looked at is said elsewhere
    return [ok(PRECISION, f"{precision} works {'on every host' if len(seen) > 1 else 'here'}")]

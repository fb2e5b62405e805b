"""DeepSpeed's compiled operations: which the run needs, and whether each host has them or can build them."""

from collections.abc import Sequence
from typing import Any

from dialogpt_ds.doctor.facts import HostFacts
from dialogpt_ds.doctor.finding import Finding, by_host, ok, problem
from dialogpt_ds.launching.machine_checks import unbuilt
from dialogpt_ds.launching.needed_ops import BuildTools, NeededOp, build_problems, needed_ops

OPS = "ops"


def op_findings(seen: Sequence[tuple[str, HostFacts]], deepspeed: dict[str, Any]) -> list[Finding]:
    """Look at what the configuration's operations need on each host."""
    wrong: list[tuple[str, str]] = []
    good: list[tuple[str, str]] = []
    for name, facts in seen:
        if "deepspeed_ops" in facts.failures:
            continue  # that it can't be imported is said elsewhere
        needed = needed_ops(deepspeed, facts.on_gpu)
        to_build = unbuilt(needed, set(facts.ops_built))
        texts = [*build_problems(to_build, BuildTools(facts.compiler, facts.ninja)), *_cuda_problems(to_build, facts)]
        # What else an operation lacks, such as the headers of libaio, check_requirements() says better for the precision's line.
        texts += [f"DeepSpeed says that {op.name} ({op.why}) can't be built there (ds_report)" for op in to_build
                  if not facts.ops_compatible.get(op.name, True) and not texts and not facts.requirement_problem]  # fmt: skip
        wrong += [(name, text) for text in texts]
        good.append((name, _summary(needed, to_build, facts)))
    return [problem(OPS, text) for text in by_host(wrong)] or [ok(OPS, text) for text in by_host(good)]


def _cuda_problems(to_build: list[NeededOp], facts: HostFacts) -> list[str]:
    on_gpu = [op for op in to_build if op.on_gpu]
    if not on_gpu:
        return []
    what = ", ".join(f"{op.name} ({op.why})" for op in on_gpu)
    cuda = facts.torch_cuda or "?"
    if not facts.nvcc:
        return [
            f"no nvcc: DeepSpeed builds {what} with CUDA's compiler on first use. Install the CUDA toolkit {cuda} (or set CUDA_HOME), or "
            'do without: "torch_adam": true in optimizer.params, no offload to NVMe'
        ]
    if facts.nvcc.split(".")[0] != cuda.split(".")[0]:
        return [
            f"nvcc is of CUDA {facts.nvcc}, PyTorch of {cuda}, and DeepSpeed refuses to build {what} with it: install the toolkit {cuda}"
        ]
    return []


def _summary(needed: list[NeededOp], to_build: list[NeededOp], facts: HostFacts) -> str:
    """Return what ds_report says of this host, and what of it matters to this run."""
    if not needed:
        use = "this run needs none of them"
    else:
        use = "this run needs " + ", ".join(
            f"{op.name} ({op.why}; {_place(facts, op) if op in to_build else 'built'})" for op in needed
        )
    can = sum(facts.ops_compatible.values())
    tools = [
        facts.compiler_version or "no C++ compiler",
        "ninja" if facts.ninja else "no ninja",
        f"nvcc {facts.nvcc}" if facts.nvcc else "no nvcc",
    ]
    return f"{use}; ds_report: {len(facts.ops_built)} of {len(facts.ops_compatible)} built ahead, {can} can be built; {', '.join(tools)}"


def _place(facts: HostFacts, op: NeededOp) -> str:
    """Return where an operation is, or will be, that DeepSpeed was not installed with."""
    return f"built {'before' if op.name in facts.ops_in_folder else 'on first use'}, in {facts.ops_folder}"

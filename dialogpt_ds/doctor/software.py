"""The software of the hosts: whether it works, this package's own code, versions, DeepSpeed's compiled operations."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

from dialogpt_ds.doctor.facts import HostFacts
from dialogpt_ds.doctor.host_facts import required
from dialogpt_ds.doctor.report import Finding, by_host, of_machines, ok, problem, warning
from dialogpt_ds.launching.machine_checks import Trouble, op_troubles
from dialogpt_ds.launching.machine_facts import BuildTools
from dialogpt_ds.launching.needed_ops import ASYNC_IO, NeededOp, needed_ops, unbuilt
from dialogpt_ds.versions import CHECKOUT, PACKAGES

SOFTWARE, CODE, VERSIONS, OPS = "software", "code", "versions", "ops"
IMPORTS = {"torch_facts": "PyTorch can't be used", "deepspeed_ops": "DeepSpeed can't be used"}
"""Parts of a host's answer that fail where a package is broken."""
SHOWN = ("python", *PACKAGES, "dialogpt-ds")
"""Named in the report, and the same on all hosts or the ranks refuse each other at the start."""


def failure_findings(seen: Sequence[tuple[str, HostFacts]]) -> list[Finding]:
    """Return what hosts could not say of themselves; without PyTorch or DeepSpeed nothing trains."""
    broken: list[tuple[str, str]] = []
    unknown: list[tuple[str, str]] = []
    for name, facts in seen:
        for part, why in facts.failures.items():
            (broken if part in IMPORTS else unknown).append(
                (name, IMPORTS.get(part, f"{part} could not be looked at") + f": {why}")
            )
    found = [
        problem(SOFTWARE, text, "install it anew there: pip install -e . (launch/constraints.txt)")
        for text in by_host(broken)
    ]
    return found + [warning(SOFTWARE, text) for text in by_host(unknown)]


def code_findings(seen: Sequence[tuple[str, HostFacts]], here: HostFacts | None) -> list[Finding]:
    """Return which hosts have other code than this one, or not the folder that the run is launched in."""
    if here is None:
        return []
    found = []
    where = (
        f"{CHECKOUT} at git revision {here.revision[:10]}" if here.revision else f"{CHECKOUT}, without a git revision"
    )
    different: list[tuple[str, str]] = []
    other_commit: list[tuple[str, str]] = []
    for name, facts in seen:
        if not facts.code:
            continue  # it could not be looked at, which is said elsewhere
        if facts.code == here.code:
            if facts.revision and here.revision and facts.revision != here.revision:
                text = f"git revision {facts.revision[:10]}, here it is {here.revision[:10]}, with the same dialogpt_ds"
                other_commit.append((name, text))
        elif facts.revision and here.revision and facts.revision != here.revision:
            different.append((name, f"git revision {facts.revision[:10]}, here it is {here.revision[:10]}"))
        else:
            at = " at the same git revision" * bool(facts.revision) or " (no git checkout there)" * bool(here.revision)
            different.append((name, f"other files in dialogpt_ds{at} than here"))
    way_out = f"bring {CHECKOUT} to one state on every host (git pull, rsync), or put it on a disk that they share"
    found += [
        problem(CODE, f"{text}; ranks with different code don't train together", way_out) for text in by_host(different)
    ]
    found += [warning(CODE, text, way_out) for text in by_host(other_commit)]
    folder = os.getcwd()
    lost = [(name, f"there is no folder {folder}, in which the launcher starts the processes") for name, facts in seen
            if not facts.folder_is_there]  # fmt: skip
    found += [problem(CODE, text, "start the launcher in a folder that every host has") for text in by_host(lost)]
    return found or [ok(CODE, f"{where}, {'the same on all hosts' if len(seen) > 1 else 'Python ' + sys.executable}")]


def version_findings(seen: Sequence[tuple[str, HostFacts]], requirements: Sequence[str] | None = None) -> list[Finding]:
    """Hold the hosts' versions against the package's ranges (lines of PEP 508; this installation's by default) and each
    other."""
    lines = required() if requirements is None else requirements
    found = []
    if not lines:
        found.append(
            warning(
                VERSIONS, "dialogpt-ds is not installed in this Python, so its ranges aren't known", "pip install -e ."
            )
        )
    outside = [(name, text) for name, facts in seen for text in out_of_range(facts.packages, lines)]
    found += [
        problem(VERSIONS, text, "pip install -e . there, which brings what setup.cfg asks for")
        for text in by_host(outside)
    ]
    if python := _required_python():
        from packaging.specifiers import SpecifierSet

        old = [(name, f"Python {facts.packages['python']}, {python} is needed") for name, facts in seen
               if facts.packages and facts.packages["python"] not in SpecifierSet(python)]  # fmt: skip
        found += [problem(VERSIONS, text) for text in by_host(old)]
    found += difference_findings(seen)
    if not found and seen:
        packages = seen[0][1].packages
        where = f", equal on all {len(seen)} hosts" if len(seen) > 1 else ""
        found.append(ok(VERSIONS, ", ".join(f"{name} {packages.get(name, '?')}" for name in SHOWN) + where))
    return found


def out_of_range(packages: dict[str, str], lines: Sequence[str]) -> list[str]:
    """Return what a host lacks of the requirements."""
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion

    problems = []
    for requirement in map(Requirement, lines):
        version = packages.get(requirement.name)
        if version is None or (requirement.marker is not None and not requirement.marker.evaluate()):
            continue
        try:
            if not version:
                problems.append(f"{requirement.name} is not installed ({requirement})")
            elif not requirement.specifier.contains(version, prereleases=True):
                problems.append(f"{requirement.name} {version} is installed, {requirement.specifier} is needed")
        except InvalidVersion:
            problems.append(f"{requirement.name} has the version {version!r}, which is none")
    return problems


def difference_findings(seen: Sequence[tuple[str, HostFacts]]) -> list[Finding]:
    """Compare all hosts with the first."""
    if len(seen) < 2:
        return []
    (first, reference), *others = seen
    findings = []
    for name in sorted(reference.packages, key=lambda name: name not in SHOWN):
        expected = reference.packages[name]
        different = [(host, f"{name} {facts.packages[name] or 'is missing'}, on {first} it is {expected or 'missing'}")
                     for host, facts in others if facts.packages.get(name, expected) != expected]  # fmt: skip
        say = problem if name in SHOWN else warning
        findings += [
            say(VERSIONS, text, "install the same versions on every host (launch/constraints.txt)")
            for text in by_host(different)
        ]
    return findings


def _required_python() -> str:
    try:
        return metadata("dialogpt-ds")["Requires-Python"] or ""
    except PackageNotFoundError:
        return ""


def op_findings(seen: Sequence[tuple[str, HostFacts]], deepspeed: dict[str, Any]) -> list[Finding]:
    """Look at what the configuration's operations need on each host."""
    wrong: list[tuple[str, Trouble]] = []
    good: list[tuple[str, str]] = []
    for name, facts in seen:
        if "deepspeed_ops" in facts.failures:
            continue  # that it can't be imported is said elsewhere
        needed = needed_ops(deepspeed, facts.on_gpu)
        to_build = unbuilt(needed, set(facts.ops_built))
        tools = BuildTools(facts.compiler, facts.ninja, facts.compiler_name, facts.nvcc)
        troubles = list(op_troubles(to_build, tools, facts.torch_cuda))
        # What async_io lacks, the precision's line says better.
        troubles += [Trouble(f"DeepSpeed says that {op.name} ({op.why}) can't be built there "
                             f"(ds_report)") for op in to_build
                     if not facts.ops_compatible.get(op.name,
                                                     True) and op.name != ASYNC_IO and not troubles]  # fmt: skip
        wrong += [(name, trouble) for trouble in troubles]
        good.append((name, _summary(needed, to_build, facts)))
    return of_machines(OPS, wrong) or [ok(OPS, text) for text in by_host(good)]


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
    return (
        f"{use}; ds_report: {len(facts.ops_built)} of {len(facts.ops_compatible)} built ahead, {can} can be "
        f"built; {', '.join(tools)}"
    )


def _place(facts: HostFacts, op: NeededOp) -> str:
    """Return where an operation is, or will be, that DeepSpeed was not installed with."""
    return f"built {'before' if op.name in facts.ops_in_folder else 'on first use'}, in {facts.ops_folder}"

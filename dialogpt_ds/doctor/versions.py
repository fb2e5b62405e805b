"""Versions: within the ranges that the package states, and equal on all hosts."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata

from dialogpt_ds.doctor.facts import HostFacts
from dialogpt_ds.doctor.finding import Finding, by_host, ok, problem, warning
from dialogpt_ds.doctor.software_facts import required
from dialogpt_ds.versions import PACKAGES

VERSIONS = "versions"
SHOWN = ("python", *PACKAGES, "dialogpt-ds")
"""Named in the report, and the same on all hosts or the ranks refuse each other at the start."""


def version_findings(seen: Sequence[tuple[str, HostFacts]], requirements: Sequence[str] | None = None) -> list[Finding]:
    """Hold the hosts' versions against the package's ranges (lines of PEP 508; this installation's by default) and each other."""
    lines = required() if requirements is None else requirements
    found = []
    if not lines:
        found.append(
            warning(VERSIONS, "dialogpt-ds is not installed in this Python, so its ranges aren't known", "pip install -e .")
        )
    outside = [(name, text) for name, facts in seen for text in out_of_range(facts.packages, lines)]
    found += [problem(VERSIONS, text, "pip install -e . there, which brings what setup.cfg asks for") for text in by_host(outside)]
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
            say(VERSIONS, text, "install the same versions on every host (launch/constraints.txt)") for text in by_host(different)
        ]
    return findings


def _required_python() -> str:
    try:
        return metadata("dialogpt-ds")["Requires-Python"] or ""
    except PackageNotFoundError:
        return ""

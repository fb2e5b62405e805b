"""The hosts of a run: reached without a password, each once, with the same folder, Python and code."""

import os
import shutil
import sys
from collections.abc import Sequence

from dialogpt_ds.doctor.facts import HostFacts
from dialogpt_ds.doctor.finding import Finding, by_host, ok, problem, warning
from dialogpt_ds.doctor.ssh import APPEND, HOST, Ssh
from dialogpt_ds.doctor.survey import Survey
from dialogpt_ds.launching.hostfile import Host
from dialogpt_ds.versions import CHECKOUT

SSH, LAUNCHER, KEEP_ALIVE, CODE = "ssh", "launcher", "keep-alive", "code"
KEEP_ALIVE_SECONDS = 15
SOFTWARE = "software"
IMPORTS = {"torch_facts": "PyTorch can't be used", "deepspeed_ops": "DeepSpeed can't be used"}
"""Parts of a host's answer that fail where a package is broken."""


def ssh_findings(survey: Survey) -> list[Finding]:
    """Return which hosts did not answer, and why."""
    found: list[Finding] = []
    silent = [(name, answer) for name, answer in survey.answers.items() if answer.facts is None]
    for say, late in ((problem, False), (warning, True)):
        of_kind = [(name, f"{answer.trouble}\n{answer.way_out}") for name, answer in silent if answer.late is late]
        for text in by_host(of_kind):
            alone = [name for name, _ in of_kind if text.startswith(f"{name}: ")]
            trouble, _, way_out = (text.replace(HOST, alone[0]) if alone else text).partition("\n")
            found.append(say(SSH, trouble, way_out))
    if not silent and survey.answers:
        number = len(survey.answers)
        found.append(ok(SSH, f"{number:,} host{'s answer' if number != 1 else ' answers'} without a password"))
    return found


def machine_findings(seen: Sequence[tuple[str, HostFacts]]) -> list[Finding]:
    """Return which names of the hostfile mean one machine, whose GPUs would be given out twice."""
    found = []
    for number, (name, facts) in enumerate(seen):
        for other_name, other in seen[:number]:
            if facts.same_machine(other):
                found.append(
                    problem(SSH, f"{other_name} and {name} are one machine ({facts.hostname})", "name it once in the hostfile")
                )
                break
    return found


def launcher_findings(
    hosts: Sequence[Host], here: HostFacts | None, seen: Sequence[tuple[str, HostFacts]], no_ssh: bool = False
) -> list[Finding]:
    """Return what the deepspeed command needs here to start the other hosts' processes."""
    if no_ssh:
        return [ok(LAUNCHER, "--no_ssh: it is started on each host")]
    if len(hosts) == 1:
        facts = dict(seen).get(hosts[0].name)
        if here is not None and facts is not None and not here.same_machine(facts):
            return [
                problem(
                    LAUNCHER,
                    f"the hostfile names {hosts[0].name} alone, and the deepspeed command starts the processes of a single host on the "
                    f"machine that it is started on, which is {here.hostname}",
                    f"start it on {hosts[0].name}, or add --force_multi",
                )
            ]
        return [ok(LAUNCHER, "a single host: pdsh is not needed")] if facts is not None else []
    missing = [program for program in ("pdsh", "ssh") if shutil.which(program) is None]
    if missing:
        way_out = "Debian: apt-get install pdsh openssh-client; or start the run on each host (--no_ssh), or with srun"
        return [
            problem(
                LAUNCHER, f"{' and '.join(missing)} is not installed here, and the deepspeed command starts hosts with it", way_out
            )
        ]
    return [ok(LAUNCHER, "pdsh and ssh are here")]


def keep_alive_findings(hosts: Sequence[Host], ssh: Ssh) -> list[Finding]:
    """Return whether ssh would notice a broken link; it is asked about a few hosts, since most files of ssh are about all of them."""
    silent = []
    for host in hosts[:8]:
        settings = ssh.effective(host.name)
        if settings.get("serveraliveinterval") == "0":
            silent.append(host.name)
    if not silent:
        return [ok(KEEP_ALIVE, "ssh asks the hosts whether they are still there")]
    text = (
        "ssh never asks whether a host is still there (ServerAliveInterval 0): where a link breaks, the ranks end, but the deepspeed "
        "command waits on"
    )
    way_out = f"export {APPEND}='-o ServerAliveInterval={KEEP_ALIVE_SECONDS}', or ServerAliveInterval {KEEP_ALIVE_SECONDS} in ~/.ssh/config"
    return [warning(KEEP_ALIVE, line, way_out) for line in by_host((name, text) for name in silent)]


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
        problem(SOFTWARE, text, "install it anew there: pip install -e . (launch/constraints.txt)") for text in by_host(broken)
    ]
    return found + [warning(SOFTWARE, text) for text in by_host(unknown)]


def code_findings(seen: Sequence[tuple[str, HostFacts]], here: HostFacts | None) -> list[Finding]:
    """Return which hosts have other code than this one, or not the folder that the run is launched in."""
    if here is None:
        return []
    found = []
    where = f"{CHECKOUT} at git revision {here.revision[:10]}" if here.revision else f"{CHECKOUT}, without a git revision"
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
    found += [problem(CODE, f"{text}; ranks with different code don't train together", way_out) for text in by_host(different)]
    found += [warning(CODE, text, way_out) for text in by_host(other_commit)]
    folder = os.getcwd()
    lost = [(name, f"there is no folder {folder}, in which the launcher starts the processes") for name, facts in seen
            if not facts.folder_is_there]  # fmt: skip
    found += [problem(CODE, text, "start the launcher in a folder that every host has") for text in by_host(lost)]
    return found or [ok(CODE, f"{where}, {'the same on all hosts' if len(seen) > 1 else 'Python ' + sys.executable}")]

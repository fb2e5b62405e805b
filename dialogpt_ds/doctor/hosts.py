"""The hosts of a run and the files that name them: as the launcher reads them, reached without a password, each
once."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from dialogpt_ds.doctor.facts import HostFacts
from dialogpt_ds.doctor.report import Finding, by_host, ok, problem, some, warning
from dialogpt_ds.doctor.ssh import APPEND, HOST, Ssh
from dialogpt_ds.doctor.survey import Survey
from dialogpt_ds.errors import UserError
from dialogpt_ds.launching.environment_file import NAME_VARIABLE, find_environment_files, read_environment_file
from dialogpt_ds.launching.hostfile import Host, read_hostfile

HOSTFILE, VARIABLES = "hostfile", "variables"
SSH, LAUNCHER, KEEP_ALIVE = "ssh", "launcher", "keep-alive"
KEEP_ALIVE_SECONDS = 15


def hostfile_findings(named: str, num_gpus: int | None) -> tuple[list[Finding], list[Host]]:
    """Read the hostfile; returns the hosts, none where there is no file or a wrong one.

    As the launcher does it, `num_gpus` takes the place of all slots.
    """
    if not named:
        return [ok(HOSTFILE, "none: this machine alone")], []
    try:
        hosts = read_hostfile(Path(named))
    except UserError as error:
        return [problem(HOSTFILE, line) for line in str(error).splitlines()], []
    if num_gpus is not None:
        hosts = [Host(host.name, num_gpus, host.line) for host in hosts]
    processes = sum(host.slots for host in hosts)
    count = f"{len(hosts):,} host{'s' * (len(hosts) != 1)} with {processes:,} process{'es' * (processes != 1)}"
    return [ok(HOSTFILE, f"{named}: {count}: {some(f'{host.name} {host.slots}' for host in hosts)}")], hosts


def variables_findings(hosts: Sequence[Host], files: Sequence[Path] | None = None) -> list[Finding]:
    """Look at the files of variables; what is wrong in them matters where there are several hosts, and is said in any
    case."""
    found: list[Finding] = []
    files = find_environment_files() if files is None else files
    wrong = problem if len(hosts) > 1 else warning
    for path in files:
        try:
            read = read_environment_file(path)
        except UserError as error:
            found.append(wrong(VARIABLES, str(error)))
            continue
        found += [wrong(VARIABLES, text) for text in read.problems]
        found += [warning(VARIABLES, text) for text in read.warnings]
        if read.secrets_warning:
            found.append(warning(VARIABLES, read.secrets_warning))
        if not (read.problems or read.warnings or read.secrets):
            found.append(ok(VARIABLES, f"{path}: {some(read.variables)}"))
    return found or [
        ok(VARIABLES, f"no .deepspeed_env (nor {NAME_VARIABLE}) that the launcher would give to all hosts")
    ]


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
                    problem(
                        SSH,
                        f"{other_name} and {name} are one machine ({facts.hostname})",
                        "name it once in the hostfile",
                    )
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
                    f"the hostfile names {hosts[0].name} alone, and the deepspeed command starts the processes of a "
                    f"single host on the machine that it is started on, which is {here.hostname}",
                    f"start it on {hosts[0].name}, or add --force_multi",
                )
            ]
        return [ok(LAUNCHER, "a single host: pdsh is not needed")] if facts is not None else []
    missing = [program for program in ("pdsh", "ssh") if shutil.which(program) is None]
    if missing:
        way_out = "Debian: apt-get install pdsh openssh-client; or start the run on each host (--no_ssh), or with srun"
        return [
            problem(
                LAUNCHER,
                f"{' and '.join(missing)} is not installed here, and the deepspeed command starts hosts with it",
                way_out,
            )
        ]
    return [ok(LAUNCHER, "pdsh and ssh are here")]


def keep_alive_findings(hosts: Sequence[Host], ssh: Ssh) -> list[Finding]:
    """Return whether ssh would notice a broken link; it is asked about a few hosts, since most files of ssh are about
    all of them."""
    silent = []
    for host in hosts[:8]:
        settings = ssh.effective(host.name)
        if settings.get("serveraliveinterval") == "0":
            silent.append(host.name)
    if not silent:
        return [ok(KEEP_ALIVE, "ssh asks the hosts whether they are still there")]
    text = (
        "ssh never asks whether a host is still there (ServerAliveInterval 0): where a link breaks, the ranks end, but "
        "the deepspeed command waits on"
    )
    way_out = (
        f"export {APPEND}='-o ServerAliveInterval={KEEP_ALIVE_SECONDS}', or ServerAliveInterval "
        f"{KEEP_ALIVE_SECONDS} in ~/.ssh/config"
    )
    return [warning(KEEP_ALIVE, line, way_out) for line in by_host((name, text) for name in silent)]

"""The files that the launcher reads: the hostfile, and the one with variables for all hosts."""

from collections.abc import Sequence
from pathlib import Path

from dialogpt_ds.doctor.finding import Finding, ok, problem, some, warning
from dialogpt_ds.errors import UserError
from dialogpt_ds.launching.environment_file import NAME_VARIABLE, find_environment_files, read_environment_file
from dialogpt_ds.launching.hostfile import Host, read_hostfile
from dialogpt_ds.launching.machine_checks import secrets_text

HOSTFILE, VARIABLES = "hostfile", "variables"


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
    """Look at the files of variables; what is wrong in them matters where there are several hosts, and is said in any case."""
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
        if read.secrets:
            found.append(warning(VARIABLES, secrets_text(path, read.secrets)))
        if not (read.problems or read.warnings or read.secrets):
            found.append(ok(VARIABLES, f"{path}: {some(read.variables)}"))
    return found or [ok(VARIABLES, f"no .deepspeed_env (nor {NAME_VARIABLE}) that the launcher would give to all hosts")]

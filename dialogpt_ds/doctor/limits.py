"""Limits of the hosts: shared memory, open files, memory for the processes themselves, the disk of output_dir."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from dialogpt_ds.doctor.facts import Seen
from dialogpt_ds.doctor.report import Finding, by_host, of_machines, ok, problem, warning
from dialogpt_ds.doctor.survey import Survey
from dialogpt_ds.launching.machine_checks import disk_troubles, shared_memory_troubles
from dialogpt_ds.launching.machine_facts import SHARED_MEMORY

SHM, FILES, MEMORY, OUTPUT_DIR = "/dev/shm", "open files", "memory", "output_dir"
FILES_FOR_ITSELF = 512
"""Files that a rank has open, and some to spare: libraries, shards, pipes to its loader."""
FILES_PER_RANK = 4
"""Connections that a rank has to each other one, and some to spare."""
PROCESS_BYTES = 1_000_000_000
"""Resident memory of a rank with its loader process and a very small model (measured on Python 3.11, torch 2.13: 0.6
and 0.3 GB)."""


def shm_findings(seen: Seen, ranks: Mapping[str, int]) -> list[Finding]:
    """Return where /dev/shm is too small for the ranks there."""
    looked_at = [(name, facts) for name, facts in seen if "limits" not in facts.failures]
    found = [(name, trouble) for name, facts in looked_at
             for trouble in shared_memory_troubles(SHARED_MEMORY, *facts.shared_memory, ranks[name],
                                                   facts.on_gpu)]  # fmt: skip
    if found or not looked_at:
        return of_machines(SHM, found)
    return [ok(SHM, f"{min(facts.shared_memory[1] for _, facts in looked_at) / 1e6:,.0f} MB free{_on_all(seen)}")]


def file_findings(seen: Seen, world_size: int) -> list[Finding]:
    """Return where a process may not open as many files as its connections and shards need."""
    needed = FILES_FOR_ITSELF + FILES_PER_RANK * world_size
    low = by_host(
        (name, f"a process may open {facts.open_files:,} files, and {needed:,} may be needed") for name, facts in seen
        if 0 <= facts.open_files < needed
    )  # fmt: skip
    way_out = "raise it: ulimit -n 65536, or nofile in /etc/security/limits.conf (docker run --ulimit nofile=65536)"
    least = min((facts.open_files for _, facts in seen if facts.open_files >= 0), default=0)
    shown = f"a process may open {least:,}" if least else "no limit"
    return [warning(FILES, text, way_out) for text in low] or [ok(FILES, f"{shown}{_on_all(seen)}")]


def memory_findings(seen: Seen, ranks: Mapping[str, int]) -> list[Finding]:
    """Return where the free memory is little even for processes that train nothing."""
    low = by_host(
        (name, f"{_gb(facts.memory[1])} free, and {ranks[name]} processes take {_gb(PROCESS_BYTES * ranks[name])} "
               f"before the model")
        for name, facts in seen if facts.memory[1] < PROCESS_BYTES * ranks[name]
    )  # fmt: skip
    least = min((facts.memory[1] for _, facts in seen), default=0)
    whole = _gb(min((facts.memory[0] for _, facts in seen), default=0))
    return [warning(MEMORY, text) for text in low] or [ok(MEMORY, f"{_gb(least)} of {whole} free{_on_all(seen)}")]


def _on_all(seen: Iterable[object]) -> str:
    return " on each host, or more" if len(list(seen)) > 1 else ""


def output_findings(seen: Seen, output_dir: Path, checkpoint: int, of_run: int, keep: int) -> list[Finding]:
    """Look at the disk of output_dir.

    Args:
        seen: the hosts, the first of which writes most of it.
        output_dir: absolute.
        checkpoint: bytes of a checkpoint, about; 0: not known.
        of_run: bytes of all that the run keeps there, about.
        keep: `--keep_checkpoints`.
    """
    refused = [
        (name, f"{facts.output_problem}, for --output_dir {output_dir}") for name, facts in seen if facts.output_problem
    ]
    if refused:
        way_out = "name a folder that you may write to and rename folders in, on every host; a mounted bucket is none"
        return [problem(OUTPUT_DIR, text, way_out) for text in by_host(refused)]
    free = min((facts.output_free for _, facts in seen), default=0)
    if troubles := list(disk_troubles(output_dir, free, checkpoint, of_run, keep)):
        return of_machines(OUTPUT_DIR, (("", trouble) for trouble in troubles))
    need = f", the run's checkpoints take up to about {_gb(of_run)}" if checkpoint else ""
    return [ok(OUTPUT_DIR, f"{output_dir} can be written to, {_gb(free)} free{need}")]


def shared_findings(survey: Survey, output_dir: Path) -> list[Finding]:
    """Return which hosts don't see what the first one writes to output_dir."""
    if survey.meeting is None or len(survey.answers) < 2:
        return []
    first = next(iter(survey.answers))
    if not survey.meeting.token:
        return [problem(OUTPUT_DIR, f"{first}: {survey.meeting.token_problem}, so whether it is shared is not known")]
    blind = [(name, f"what {first} writes to {output_dir} is not seen") for name, answer in survey.answers.items()
             if answer.visit and answer.visit.sees_token is False]  # fmt: skip
    if blind:
        way_out = "name a folder on a disk that all hosts share (NFS, Lustre), under the same path on each"
        return [problem(OUTPUT_DIR, text, way_out) for text in by_host(blind)]
    return [ok(OUTPUT_DIR, f"all hosts see what {first} writes there")]


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"

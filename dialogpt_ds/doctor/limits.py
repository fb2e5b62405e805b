"""Limits of the hosts: shared memory, open files, memory for the processes themselves."""

from collections.abc import Iterable, Mapping

from dialogpt_ds.doctor.facts import Seen
from dialogpt_ds.doctor.finding import Finding, by_host, ok, problem, warning
from dialogpt_ds.launching.machine_checks import SHARED_MEMORY, shared_memory_text

SHM, FILES, MEMORY = "/dev/shm", "open files", "memory"
FILES_FOR_ITSELF = 512
"""Files that a rank has open, and some to spare: libraries, shards, pipes to its loader."""
FILES_PER_RANK = 4
"""Connections that a rank has to each other one, and some to spare."""
PROCESS_BYTES = 1_000_000_000
"""Resident memory of a rank with its loader process and a very small model (measured on Python 3.11, torch 2.13: 0.6 and 0.3 GB)."""


def shm_findings(seen: Seen, ranks: Mapping[str, int]) -> list[Finding]:
    """Return where /dev/shm is too small for the ranks there."""
    wrong, doubtful = [], []
    for name, facts in seen:
        problems, warnings = shared_memory_text(str(SHARED_MEMORY), *facts.shared_memory, ranks[name], facts.on_gpu)
        wrong += [(name, text) for text in problems]
        doubtful += [(name, text) for text in warnings]
    found = [problem(SHM, text) for text in by_host(wrong)] + [warning(SHM, text) for text in by_host(doubtful)]
    least = min((facts.shared_memory[1] for _, facts in seen), default=0)
    return found or [ok(SHM, f"{least / 1e6:,.0f} MB free{_on_all(seen)}")]


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
        (name, f"{_gb(facts.memory[1])} free, and {ranks[name]} processes take {_gb(PROCESS_BYTES * ranks[name])} before the model")
        for name, facts in seen if facts.memory[1] < PROCESS_BYTES * ranks[name]
    )  # fmt: skip
    least = min((facts.memory[1] for _, facts in seen), default=0)
    whole = _gb(min((facts.memory[0] for _, facts in seen), default=0))
    return [warning(MEMORY, text) for text in low] or [ok(MEMORY, f"{_gb(least)} of {whole} free{_on_all(seen)}")]


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _on_all(seen: Iterable[object]) -> str:
    return " on each host, or more" if len(list(seen)) > 1 else ""

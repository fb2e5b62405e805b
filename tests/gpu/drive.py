"""Runs the checks one after the other, each in a process of its own with its own time limit, and prints a table of what
they told.

python -m tests.gpu.drive one [CHECK...]      what one GPU shows
python -m tests.gpu.drive two [CHECK...]      what two GPUs show
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.gpu.common import ON_GPU, ROOT, out, report, work


@dataclass(frozen=True)
class Check:
    """A process that makes checks."""

    name: str
    """In front of the names of what it tells."""
    words: tuple[str, ...]
    """Its module in tests.gpu, and arguments."""
    limit: float
    """Seconds."""


PATIENCE = 1 if ON_GPU else 5
"""Factor of all limits; nobody lends a CPU by the minute."""
SPEEDS = (("117M", 20, 40), ("345M", 10, 40), ("762M", 5, 50)) if ON_GPU else (("tiny", 2, 40),)
"""Models, rows of a step, limits."""
ONE = (
    Check("data", ("data",), 25),
    Check("environment", ("environment",), 20),
    Check("loss", ("loss",), 50),
    Check("stages", ("stages",), 130),
    Check("waits", ("waits",), 35),
    Check("repeat", ("repeat",), 40),
    Check("two_on_one", ("two_on_one",), 40),
    *(Check(f"speed.{model}", ("speed", model, str(rows)), limit) for model, rows, limit in SPEEDS),
    Check("memory", ("memory",), 30),
    Check("compiled", ("speed", "compiled", str(40 * PATIENCE)), 40),
)
"""In order of what tells most: a run that is cut has made the first of them. All limits together are at most nine
minutes."""
TWO = (Check("data", ("data",), 20), Check("two", ("two",), 280))
SHOWN = 150
"""Characters of a line's details in the table."""


def run(check: Check, log: Any) -> None:
    """Run a check's process; tells a failure where it tells none itself."""
    started = time.perf_counter()
    log.write(f"\n===== {check.name}\n")
    log.flush()
    begin = log.tell()
    command = [sys.executable, "-m", f"tests.gpu.{check.words[0]}", *check.words[1:]]
    with subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True) as process:
        try:
            code: int | None = process.wait(check.limit * PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has left behind
    if code != 0:
        with open(log.name, encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            said = file.read()[-1_500:]
        ended = f"took longer than its {check.limit * PATIENCE:.0f} s" if code is None else f"ended with {code}"
        report(check.name, False, time.perf_counter() - started, error=f"{ended}: ...{said}")


def results() -> list[dict[str, Any]]:
    """Return what was told so far."""
    path = out() / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def row(line: dict[str, Any], length: int = SHOWN) -> str:
    """Return a result as a line of the table, its details cut to a length."""
    mark = {True: "passed", False: "FAILED", None: "left out"}[line["ok"]]
    details = {name: value for name, value in line.items() if name not in ("check", "ok", "seconds")}
    said = ", ".join(f"{name} {value}" for name, value in details.items()).replace("\n", " ")
    return f"{line['check']:<34} {mark:<8} {line['seconds']:>7.1f} s  {said[:length]}"


def summary(found: Sequence[dict[str, Any]]) -> str:
    """Return what failed, at length, and how many did."""
    failed = [line for line in found if line["ok"] is False]
    left_out = sum(line["ok"] is None for line in found)
    return "\n".join(
        [*(row(line, 600) for line in failed), f"{len(found)} checks, {len(failed)} failed, {left_out} left out"]
    )


def main(words: Sequence[str]) -> int:
    """Run what is asked for; returns the exit code."""
    checks = {"one": ONE, "two": TWO}[words[0]]
    wanted = set(words[1:])
    unknown = wanted - {check.name for check in checks}
    if unknown:
        print(
            f"error: no check {', '.join(sorted(unknown))}; there are {', '.join(check.name for check in checks)}",
            file=sys.stderr,
        )
        return 2
    (out() / "results.jsonl").unlink(missing_ok=True)
    shown = 0
    with open(out() / "log.txt", "w", encoding="utf-8") as log:
        for check in checks:
            if not wanted or check.name in wanted or check.name == "data":
                run(check, log)
                found = results()
                print("\n".join(map(row, found[shown:])), flush=True)
                shown = len(found)
    shutil.rmtree(work(), ignore_errors=True)
    found = results()
    (out() / "table.txt").write_text("\n".join([*map(row, found), summary(found)]) + "\n", encoding="utf-8")
    print(summary(found))
    return 1 if any(line["ok"] is False for line in found) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

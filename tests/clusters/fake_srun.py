#!/usr/bin/env python3
"""An srun for one machine: starts the tasks of the command with SLURM's variables for each, and ends as the real one
does.

What it imitates was seen at SLURM 22.05: the variables, `--kill-on-bad-exit`, and the exit code, which is the highest
of the tasks' codes, 128 + number for a task that a signal ended. It writes the tasks' process ids into
$FAKE_SLURM/tasks.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def task_environment(number: int, tasks: int, nodes: int) -> dict[str, str]:
    """Return the environment of a task: nodes are 127.0.0.1, 127.0.0.2, ..., with equally many tasks each, in
    blocks."""
    here = tasks // nodes
    names = "127.0.0.1" if nodes == 1 else f"127.0.0.[1-{nodes}]"
    per_node = str(here) if nodes == 1 else f"{here}(x{nodes})"
    return os.environ | {
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number % here),
        "SLURM_NODEID": str(number // here),
        "SLURM_NODELIST": names,
        "SLURM_JOB_NODELIST": names,
        "SLURM_STEP_ID": "0",
        "SLURM_STEPID": "0",
        "SLURM_STEP_NODELIST": names,
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_TASKS_PER_NODE": per_node,
        "SLURMD_NODENAME": f"127.0.0.{number // here + 1}",
    }


def wait_for(tasks: list[subprocess.Popen[bytes]], kill_on_bad_exit: bool) -> int:
    """Wait for all tasks; returns what srun would."""
    codes: dict[int, int] = {}
    while len(codes) < len(tasks):
        for number, task in enumerate(tasks):
            if number in codes or task.poll() is None:
                continue
            codes[number] = 128 - task.returncode if task.returncode < 0 else task.returncode
            if codes[number]:
                print(f"srun: error: task {number}: Exited with exit code {codes[number]}", file=sys.stderr, flush=True)
            if codes[number] and kill_on_bad_exit:
                for other in tasks:
                    other.terminate()
        time.sleep(0.05)
    return max(codes.values())


def main() -> int:
    """Run the step."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--cpus-per-task", required=True, help="since 22.05 srun does not take it from the batch job")
    parser.add_argument("--kill-on-bad-exit", type=int, nargs="?", const=1, default=0)
    parser.add_argument("--wait", type=int, default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    count, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
    tasks: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: object) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGUSR1, hand_on)
    for number in range(count):
        tasks.append(subprocess.Popen(arguments.command, env=task_environment(number, count, nodes)))
    Path(os.environ["FAKE_SLURM"], "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    return wait_for(tasks, bool(arguments.kill_on_bad_exit))


if __name__ == "__main__":
    raise SystemExit(main())

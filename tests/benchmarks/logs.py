"""What logging every step costs: the time that rank 0 spends on it, as a share of its steps.

    python -m tests.benchmarks.logs --tsv ../shared/data/reddit_t1000.tsv --models 117M tiny

A real run in one process, in a terminal, writes to every sink (the log files, the progress bar, TensorBoard, wandb
offline). "told" is what each rank does for the reduction at a step's end, "recorded" what rank 0 does after it, while
the other ranks are at the next step's rows already; "thread" is the processor time of wandb's thread, which shares the
interpreter with the step. All are measured inside of the run, so they are shares of the same steps, whatever else the
machine is doing. "beside" is the processor time of wandb's own processes.
"""

import argparse
import contextlib
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.train import ROOT, make_shards

WARMUP = 3
"""Steps that are not counted."""


def main() -> None:
    """Run the benchmark, or its worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tsv", required=True, help="conversations in DialoGPT's format")
    parser.add_argument("--models", nargs="+", default=["117M", "tiny"])
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--steps", type=int, default=12, help="counted steps")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(json.loads(arguments.worker))))
        return
    heads = ("step, s", "told, ms", "recorded, ms", "thread, ms", "of a step", "beside, ms", "1% of a step of, ms")
    print(f"{'':<8} " + " ".join(f"{head:>20}" for head in heads))
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        make_shards(arguments.tsv, shards, 128)
        for model in arguments.models:
            found = worker(arguments, model, shards, Path(folder, model))
            cost = found["told"] + found["recorded"] + found["thread"]
            parts = (f"{found[name] * 1e3:.3f}" for name in ("told", "recorded", "thread"))
            cells = (
                f"{found['step']:.3f}",
                *parts,
                f"{cost / found['step']:.3%}",
                f"{found['beside'] * 1e3:.3f}",
                f"{cost * 1e5:.1f}",
            )
            print(f"{model:<8} " + " ".join(f"{cell:>20}" for cell in cells))


def worker(arguments: argparse.Namespace, model: str, shards: Path, output: Path) -> dict[str, float]:
    """Run one model in a process of its own; returns medians over its steps, seconds."""
    words = [
        "--model", model, "--train_input_file", str(shards), "--skip_eval", "--fp16", "False", "--lr_schedule", "None",
        "--train_batch_size", str(arguments.rows), "--gradient_accumulation_steps", "1", "--valid_step", "1000000",
        "--num_optim_steps", str(WARMUP + arguments.steps), "--output_dir", str(output), "--tensorboard",
        "--wandb_mode", "offline",
    ]  # fmt: skip
    command = [sys.executable, "-m", "tests.benchmarks.logs", "--tsv", arguments.tsv, "--worker", json.dumps(words)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    mine, theirs = pty.openpty()  # a terminal for the bar, which writes to stderr
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=ROOT, env=environment
    ) as process:
        os.close(theirs)
        reader = threading.Thread(target=drained, args=(mine,), daemon=True)
        reader.start()
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 0, output[-3_000:]
    return json.loads(output.strip().splitlines()[-1])


def drained(terminal: int) -> None:
    """Read what comes to a terminal until it is closed."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 4_096):
            pass


def measure(words: list[str]) -> dict[str, float]:
    """Train, and look at the clock around what logging does."""
    import psutil

    from dialogpt_ds.commands import train
    from dialogpt_ds.logs import wandb_run
    from dialogpt_ds.training import loop

    times: dict[str, list[float]] = {"step": [], "told": [], "recorded": [], "thread": []}
    processor: list[float] = []

    def timed(
        name: str, method: Callable[..., Any], clock: Callable[[], float] = time.perf_counter
    ) -> Callable[..., Any]:
        def wrapped(*positional: Any, **named: Any) -> Any:
            started = clock()
            try:
                return method(*positional, **named)
            finally:
                times[name].append(clock() - started)
                if name == "step":
                    processor.append(processor_time_of_wandb(psutil.Process()))

        return wrapped

    for name, method in (("step", "_step"), ("told", "_report"), ("recorded", "_record")):
        setattr(loop.TrainingRun, method, timed(name, getattr(loop.TrainingRun, method)))
    log = timed("thread", wandb_run.WandbRun._log, time.thread_time)
    wandb_run.WandbRun._log = log  # type: ignore[method-assign]
    assert train.main(words) == 0
    medians = {name: statistics.median(found[WARMUP:]) for name, found in times.items()}
    return medians | {"beside": (processor[-1] - processor[WARMUP - 1]) / (len(processor) - WARMUP)}


def processor_time_of_wandb(process: Any) -> float:
    """Return the processor time of wandb's process so far, seconds."""
    found = 0.0
    for child in process.children():
        if "wandb-core" in child.name():
            used = child.cpu_times()
            found += used.user + used.system
    return found


if __name__ == "__main__":
    main()

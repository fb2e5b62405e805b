"""What logging every step costs: the time that rank 0 spends on it, as a share of its steps.

    python -m tests.benchmarks.logs --tsv ../shared/data/reddit_t1000.tsv --models 117M tiny

A real run in one process writes to every sink (the log files, a progress bar, TensorBoard, wandb offline). "told" is what each rank
does for the reduction at a step's end, "recorded" what rank 0 does after it, while the other ranks are at the next step's rows already;
both are measured inside of the run, so they are shares of the same steps, whatever else the machine is doing. "beside" is the
processor time of wandb's own processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
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
    print(
        f"{'':<8} {'step, s':>9} {'told, ms':>9} {'recorded, ms':>13} {'of a step':>10} {'beside, ms':>11} {'1% of a step of, ms':>20}"
    )
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        make = [sys.executable, str(ROOT / "preprocess" / "make_shards.py"), "--input", arguments.tsv, "--output", str(shards)]
        subprocess.run([*make, "--max_seq_length", "128"], check=True, stdout=subprocess.DEVNULL, timeout=600)
        for model in arguments.models:
            found = worker(arguments, model, shards, Path(folder, model))
            cost = found["told"] + found["recorded"]
            print(
                f"{model:<8} {found['step']:>9.3f} {found['told'] * 1e3:>9.3f} {found['recorded'] * 1e3:>13.3f} "
                f"{cost / found['step']:>10.3%} {found['beside'] * 1e3:>11.3f} {cost * 1e5:>20.1f}"
            )


def worker(arguments: argparse.Namespace, model: str, shards: Path, output: Path) -> dict[str, float]:
    """Run one model in a process of its own; returns medians over its steps, seconds."""
    words = [
        "--model", model, "--train_input_file", str(shards), "--skip_eval", "--fp16", "False", "--lr_schedule", "None",
        "--train_batch_size", str(arguments.rows), "--gradient_accumulation_steps", "1", "--valid_step", "1000000",
        "--num_optim_steps", str(WARMUP + arguments.steps), "--output_dir", str(output), "--tensorboard", "--wandb_mode", "offline",
    ]  # fmt: skip
    command = [sys.executable, "-m", "tests.benchmarks.logs", "--tsv", arguments.tsv, "--worker", json.dumps(words)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=3_000)
    assert done.returncode == 0, done.stderr[-3_000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(words: list[str]) -> dict[str, float]:
    """Train, and look at the clock around what logging does."""
    import psutil

    from dialogpt_ds.training import command, run

    times: dict[str, list[float]] = {"step": [], "told": [], "recorded": []}
    processor: list[float] = []

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*positional: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*positional, **named)
            finally:
                times[name].append(time.perf_counter() - started)
                if name == "step":
                    processor.append(processor_time_of_wandb(psutil.Process()))

        return wrapped

    for name, method in (("step", "_step"), ("told", "_tell"), ("recorded", "_record")):
        setattr(run.TrainingRun, method, timed(name, getattr(run.TrainingRun, method)))
    assert command.main(words) == 0
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

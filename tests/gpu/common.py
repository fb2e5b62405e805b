"""What the checks share: where they run, how they tell a result, and how they start the trainer as a user does."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
ON_GPU = os.environ.get("DEVICE", "cuda") == "cuda"
DEVICE = "cuda" if ON_GPU else "cpu"
AT_ONCE = max(min((os.cpu_count() or 1) - 2, 14), 2)
"""Processes that train a tiny model at the same time, on the one device."""
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def out() -> Path:
    """Return the folder of the results."""
    return Path(os.environ["OUT"])


def work() -> Path:
    """Return the folder for everything else, which goes at the end."""
    return Path(os.environ["WORK"])


class LeftOutError(Exception):
    """A check can't be made here; says why."""


def report(check: str, ok: bool | None, seconds: float, **details: Any) -> None:
    """Append a line to results.jsonl.

    Args:
        check: its name, with its group's in front: loss.isolation.
        ok: None: it was left out, and `reason` is among the details.
        seconds: it took.
        details: figures.
    """
    line = {"check": check, "ok": ok, "seconds": round(seconds, 2)} | details
    with open(out() / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


@contextmanager
def checked(check: str) -> Iterator[dict[str, Any]]:
    """Make one check, whose faults don't hide those after it. Yields its details, to be filled; `ok` among them is its
    outcome."""
    details: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        yield details
    except LeftOutError as reason:
        details |= {"ok": None, "reason": str(reason)}
    except Exception as error:  # whatever it is, the line says it
        traceback.print_exc()
        details |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:2_000]}
    ok = details.pop("ok", True)
    report(check, ok, time.perf_counter() - started, **details)


@dataclass(frozen=True)
class Job:
    """A process to run to its end."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """How it ended."""

    code: int
    """-1: it took too long, and was killed."""
    seconds: float
    output: str

    def expect(self, code: int = 0) -> "Done":
        """Return it; raises AssertionError with the end of what it printed where it ended otherwise."""
        assert self.code == code, f"ended with {self.code} after {self.seconds:.0f} s: ...{self.output[-1_500:]}"
        return self


def environment_of(job: Job) -> dict[str, str]:
    """Return the environment of a process that no launcher started."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    # Many start at once, and each would bring a compiler's process for each core.
    return kept | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | dict(job.environment)


def run_job(job: Job, limit: float) -> Done:
    """Run a process for at most `limit` seconds."""
    started = time.perf_counter()
    path = work() / f"{job.name}.log"
    with open(path, "wb") as log:
        try:
            code = subprocess.run(
                job.command, stdout=log, stderr=log, cwd=ROOT, env=environment_of(job), timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    text = path.read_text(errors="replace")
    print(f"--- {job.name}: exit code {code}\n{text[-3_000:]}", flush=True)
    return Done(code, time.perf_counter() - started, text)


def run_jobs(jobs: Sequence[Job], limit: float) -> dict[str, Done]:
    """Run processes, AT_ONCE at a time; returns how each ended, by name."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda job: run_job(job, limit), jobs)
        return {job.name: done for job, done in zip(jobs, found, strict=True)}


def deepspeed_config(name: str, stage: int, precision: str, zero: Mapping[str, Any] | None = None) -> str:
    """Write a DeepSpeed JSON for a tiny model and return its path."""
    blocks: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
    if stage == 3:
        blocks["stage3_param_persistence_threshold"] = 0  # else every weight of so small a model stays gathered
    config: dict[str, Any] = {
        "zero_optimization": blocks | dict(zero or {}),
        "gradient_clipping": 1.0,
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 12},
        "bf16": {"enabled": precision == "bf16"},
    }
    path = work() / f"{name}.json"
    path.write_text(json.dumps(config))
    return str(path)


def train_command(config: str, output: Path, *options: str, script: str = TRAIN) -> list[str]:
    """Return the command of a short training of the tiny model in one process; later options win over the ones here."""
    return [
        sys.executable, script, "--model", "tiny", "--train_input_file", str(shards("short") / "train"), "--skip_eval",
        "--deepspeed_config", config, "--output_dir", str(output), "--train_batch_size", "4",
        "--gradient_accumulation_steps", "2", "--lr_schedule", "None", "--learning_rate", "1e-3", "--num_optim_steps",
        "6", "--save_step", "6", "--keep_checkpoints", "0", "--pbar", "False", "--wandb_mode", "disabled", *options,
    ]  # fmt: skip


def shards(name: str) -> Path:
    """Return a folder of shards that tests.gpu.data has made: short (rows of 64, with train and validation) or long
    (rows of 512)."""
    return work() / "data" / name


def steps_of(output: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics of a run by step; of a step that was taken again, those of the last time."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "seconds_per_step" in line}


def losses_of(output: Path, first: int = 1) -> list[float]:
    """Return a run's losses from a step on."""
    return [line["loss"] for step, line in sorted(steps_of(output).items()) if step >= first]


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest difference of two series; raises AssertionError where they are not of one length, or not
    finite."""
    assert len(found) == len(expected) > 0, (found, expected)
    largest = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert largest < float("inf"), (found, expected)
    return largest

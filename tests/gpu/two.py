"""Two GPUs: what overlapping and the size of buckets are worth, NCCL's transport, equal losses, and the end of a run
with a hung rank."""

import os
import re
import signal
import statistics
import subprocess
import time
from contextlib import ExitStack
from typing import Any

from tests.gpu.common import (
    ON_GPU,
    Job,
    checked,
    deepspeed_config,
    shards,
    steps_of,
    train_command,
    work,
)
from tests.gpu.pair import Pair, compare_with_one

MODEL, ROWS, STEPS, WARMUP = ("117M", "20", 20, 5) if ON_GPU else ("tiny", "2", 3, 1)
BUCKETS = (100_000_000, 25_000_000) if ON_GPU else (1_000_000, 250_000)
"""Numbers that are reduced at a time."""
HANG_SECONDS = 60 if ON_GPU else 10
"""--hang_timeout. The watchdog of NCCL would end the run a minute later."""
LIMIT = 60.0 if ON_GPU else 240.0
EACH = ("--train_batch_size", "2", "--gradient_accumulation_steps", "1")


def main() -> None:
    """Make the checks."""
    losses()
    for overlap in (False, True):
        for bucket in BUCKETS:
            with checked(f"two.overlap_{'on' if overlap else 'off'}.bucket_{bucket}") as details:
                details |= speed(overlap, bucket)
    with checked("two.hang") as details:
        details |= hang()


def losses() -> None:
    """Compare ZeRO-2 and -3 on two GPUs with ZeRO-1 on one: the same rows a step."""
    alone = Job("alone", train_command(deepspeed_config("alone", 1, "bf16"), work() / "alone"))
    with ExitStack() as stack:
        pairs, runs = {}, {stage: work() / f"two{stage}" for stage in (2, 3)}
        for stage, run in runs.items():
            pairs[stage] = stack.enter_context(
                Pair(run.name, train_command(deepspeed_config(run.name, stage, "bf16"), run, *EACH), devices=2)
            )
        compare_with_one("two", pairs, runs, alone, LIMIT)


def speed(overlap: bool, bucket: int) -> dict[str, Any]:
    """Train with ZeRO-1; returns the tokens a second of both, and what NCCL says of itself."""
    name = f"speed-{overlap}-{bucket}"
    zero = {"overlap_comm": overlap, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    command = train_command(
        deepspeed_config(name, 1, "bf16", zero), work() / name, "--model", MODEL, "--train_input_file",
        str(shards("long")), "--train_batch_size", ROWS, "--gradient_accumulation_steps", "1", "--num_optim_steps",
        str(STEPS), "--save_step", str(STEPS),
    )  # fmt: skip
    with Pair(name, command, devices=2, environment={"NCCL_DEBUG": "INFO"}) as pair:
        pair.wait(LIMIT)
        said = pair.logs[0].read_text(errors="replace")
    steps = [step for number, step in sorted(steps_of(work() / name).items()) if number > WARMUP]
    return {
        "tokens_per_second": round(statistics.median(step["tokens_per_second"] for step in steps)),
        "step_ms": round(statistics.median(step["seconds_per_step"] for step in steps) * 1e3, 2),
        "mfu": round(statistics.median(step["mfu"] for step in steps), 4),
        "peak_gib": steps[-1]["peak_memory_gib"],
        "nccl": sorted(set(re.findall(r"NCCL version [\w.+]+", said))),
        "transports": sorted(set(re.findall(r" via ([\w/]+)", said))),
    }


def hang() -> dict[str, Any]:
    """Stop the second process in mid-run: the first must write where it stands and end by itself, before NCCL's
    watchdog aborts it."""
    output = work() / "hang"
    command = train_command(
        deepspeed_config("hang", 1, "bf16"), output, *EACH, "--num_optim_steps", "1000000", "--save_step", "1000000",
        "--hang_timeout", str(HANG_SECONDS), "--contact_timeout", "0",
    )  # fmt: skip
    with Pair("hang", command, devices=2) as pair:
        pair.wait_for_steps(output, 3, LIMIT)
        os.kill(pair.processes[1].pid, signal.SIGSTOP)
        stopped = time.monotonic()
        try:
            code = pair.processes[0].wait(HANG_SECONDS + 45)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the other is still there: {pair.said()}") from None
        seconds = round(time.monotonic() - stopped, 1)
        said = pair.said()
    assert code == 1, f"it ended with {code} (-6: NCCL's watchdog): {said}"
    stacks = output / "stacks-rank-0.txt"
    assert stacks.is_file(), f"it has not written where it stands: {said}"
    assert "nothing has moved" in said, said
    return {"hang_timeout": HANG_SECONDS, "seconds_until_its_end": seconds, "stacks": stacks.read_text()[:300]}


if __name__ == "__main__":
    main()

"""Two processes on one GPU, over gloo: each ZeRO stage gives one process's losses, and one that is killed ends the other."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dialogpt_ds.training.world import free_port
from tests.gpu.common import (
    ON_GPU,
    ROOT,
    Job,
    LeftOutError,
    checked,
    deepspeed_config,
    environment_of,
    largest_difference,
    losses_of,
    run_jobs,
    steps_of,
    train_command,
    work,
)

STAGES = (1, 2, 3)
STEPS = 4
TOLERANCE = 1e-2
"""Largest difference of a loss of about 10, in bf16: two processes add gradients up in another order and precision."""
LIMIT = 35.0 if ON_GPU else 180.0
GLOO_LACKS = ("not implemented", "unsupported", "not supported", "invalid scalar type", "does not support")
"""What gloo says of an operation or a type that it does not have."""


def main() -> None:
    """Run all pairs and the single process at the same time; then the pair of which one is killed."""
    alone = Job("alone", command("alone", 1, "--gradient_accumulation_steps", "2"))
    with ExitStack() as stack:
        pairs = {stage: stack.enter_context(Pair(f"pair{stage}", command(f"pair{stage}", stage, *HALF_EACH))) for stage in STAGES}
        doomed = stack.enter_context(Pair("doomed", command("doomed", 1, *HALF_EACH, "--num_optim_steps", "100000")))
        done = run_jobs([alone], LIMIT)
        for stage, pair in pairs.items():
            with checked(f"two_on_one.zero{stage}") as details:
                done["alone"].expect()
                pair.wait(LIMIT)
                details["difference"] = largest_difference(losses_of(work() / f"pair{stage}"), losses_of(work() / "alone"))
                assert details["difference"] < TOLERANCE, "two processes' losses are not those of one"
        with checked("two_on_one.killed") as details:
            details |= killed(doomed)


HALF_EACH = ("--train_batch_size", "2", "--gradient_accumulation_steps", "1")


def command(name: str, stage: int, *options: str) -> list[str]:
    script = str(Path(__file__).with_name("train_with_gloo.py"))
    config = deepspeed_config(name, stage, "bf16")
    return train_command(config, work() / name, "--num_optim_steps", str(STEPS), *options, script=script)


class Pair:
    """Two processes of one run, on the one device; ended with the block."""

    def __init__(self, name: str, words: list[str]) -> None:
        self.logs = [work() / f"{name}-{rank}.log" for rank in range(2)]
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = [self._start(words, rank, common) for rank in range(2)]

    def _start(self, words: list[str], rank: int, common: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        # A CPU has no numbers; the one GPU is number 0 for both.
        own = {"RANK": str(rank), "LOCAL_RANK": "0" if ON_GPU else str(rank)}
        with open(self.logs[rank], "wb") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=environment_of(Job("", words, {**common, **own})))

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self) -> str:
        """Return the end of what each has printed."""
        return "\n".join(log.read_text(errors="replace")[-1_500:] for log in self.logs)

    def wait(self, limit: float) -> None:
        """Wait for both; raises LeftOutError where gloo lacks something, AssertionError where it is another failure."""
        deadline = time.monotonic() + limit
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still at work after {limit:.0f} s: {self.said()}") from None
        if any(process.returncode for process in self.processes):
            said = self.said()
            print(said)
            lacks = next(
                (line for line in said.splitlines() if "gloo" in line.lower() and any(p in line.lower() for p in GLOO_LACKS)), ""
            )
            if lacks:
                raise LeftOutError(f"gloo can't do it on a GPU: {lacks[:300]}")
            raise AssertionError(f"ended with {[process.returncode for process in self.processes]}: {said}")


def killed(pair: Pair) -> dict[str, Any]:
    """Kill the second process in mid-run, and wait for the first to end by itself."""
    deadline = time.monotonic() + LIMIT
    while not ((work() / "doomed" / "metrics.jsonl").is_file() and len(steps_of(work() / "doomed")) >= 3):
        if any(process.poll() is not None for process in pair.processes):
            pair.wait(1)
        assert time.monotonic() < deadline, f"no three steps in {LIMIT:.0f} s: {pair.said()}"
        time.sleep(0.1)
    os.kill(pair.processes[1].pid, signal.SIGKILL)
    at = time.monotonic()
    try:
        code = pair.processes[0].wait(LIMIT)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the other is still at work after {LIMIT:.0f} s: {pair.said()}") from None
    assert code != 0, "the other ended as if all were done"
    return {"seconds_until_the_other_ended": round(time.monotonic() - at, 1), "its_code": code}


if __name__ == "__main__":
    sys.exit(main())

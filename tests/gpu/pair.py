"""Two processes of one run, watched one by one."""

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from dialogpt_ds.distributed.world import free_port
from tests.gpu.common import (
    ON_GPU,
    ROOT,
    Job,
    LeftOutError,
    checked,
    environment_of,
    largest_difference,
    losses_of,
    run_jobs,
    steps_of,
    work,
)

GLOO_LACKS = ("not implemented", "unsupported", "not supported", "invalid scalar type", "does not support")
"""What gloo says of an operation or a type that it does not have."""
TOLERANCE = 1e-2
"""Largest difference of a loss of about 10, in bf16: two processes add gradients up in another order and precision."""


class Pair:
    """Two processes of one run, without a launcher, so that each one's end is its own; ended with the block."""

    def __init__(
        self, name: str, words: list[str], devices: int = 1, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start them.

        Args:
            name: of their logs.
            words: their command.
            devices: 1: both on one GPU, over gloo; 2: on one each. A CPU has no numbers.
            environment: more of it.
        """
        self.devices = devices
        self.logs = [work() / f"{name}-{rank}.log" for rank in range(2)]
        common = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        common |= dict(environment or {})
        self.processes = [self._start(words, rank, common) for rank in range(2)]

    def _start(self, words: list[str], rank: int, common: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        own = {"RANK": str(rank), "LOCAL_RANK": "0" if ON_GPU and self.devices == 1 else str(rank)}
        with open(self.logs[rank], "wb") as log:
            return subprocess.Popen(
                words, stdout=log, stderr=log, cwd=ROOT, env=environment_of(Job("", words, {**common, **own}))
            )

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self) -> str:
        """Return the end of what each has printed."""
        return "\n".join(log.read_text(errors="replace")[-1_500:] for log in self.logs)

    def wait_for_steps(self, output: Path, number: int, limit: float) -> None:
        """Wait for so many steps of the run in an output folder; raises as `wait` does where it ends before that."""
        deadline = time.monotonic() + limit
        while not ((output / "metrics.jsonl").is_file() and len(steps_of(output)) >= number):
            if any(process.poll() is not None for process in self.processes):
                self.wait(1)
            assert time.monotonic() < deadline, f"no {number} steps in {limit:.0f} s: {self.said()}"
            time.sleep(0.1)

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
                (
                    line
                    for line in said.splitlines()
                    if "gloo" in line.lower() and any(p in line.lower() for p in GLOO_LACKS)
                ),
                "",
            )
            if lacks:
                raise LeftOutError(f"gloo can't do it on a GPU: {lacks[:300]}")
            raise AssertionError(f"ended with {[process.returncode for process in self.processes]}: {said}")


def compare_with_one(check: str, pairs: Mapping[int, Pair], runs: Mapping[int, Path], alone: Job, limit: float) -> None:
    """Compare the losses of pairs by ZeRO stage with those of one process, whose run is in the folder of its name: the
    same rows a step."""
    one = run_jobs([alone], limit)[alone.name]
    for stage, pair in pairs.items():
        with checked(f"{check}.zero{stage}") as details:
            one.expect()
            pair.wait(limit)
            details["difference"] = largest_difference(losses_of(runs[stage]), losses_of(work() / alone.name))
            assert details["difference"] < TOLERANCE, "two processes' losses are not those of one"

"""Two processes on one GPU, over gloo: each ZeRO stage gives one process's losses, and one that is killed ends the
other."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.gpu.common import (
    ON_GPU,
    Job,
    checked,
    deepspeed_config,
    train_command,
    work,
)
from tests.gpu.pair import Pair, compare_with_one

STAGES = (1, 2, 3) if ON_GPU else (3,)
STEPS = 4
LIMIT = 35.0 if ON_GPU else 180.0


def main() -> None:
    """Run all pairs and the single process at the same time; then the pair of which one is killed."""
    alone = Job("alone", command("alone", 1, "--gradient_accumulation_steps", "2"))
    with ExitStack() as stack:
        pairs = {
            stage: stack.enter_context(Pair(f"pair{stage}", command(f"pair{stage}", stage, *HALF_EACH)))
            for stage in STAGES
        }
        doomed = stack.enter_context(Pair("doomed", command("doomed", 1, *HALF_EACH, "--num_optim_steps", "100000")))
        compare_with_one("two_on_one", pairs, {stage: work() / f"pair{stage}" for stage in STAGES}, alone, LIMIT)
        with checked("two_on_one.killed") as details:
            details |= killed(doomed)


HALF_EACH = ("--train_batch_size", "2", "--gradient_accumulation_steps", "1")


def command(name: str, stage: int, *options: str) -> list[str]:
    script = str(Path(__file__).with_name("train_with_gloo.py"))
    config = deepspeed_config(name, stage, "bf16")
    return train_command(config, work() / name, "--num_optim_steps", str(STEPS), *options, script=script)


def killed(pair: Pair) -> dict[str, Any]:
    """Kill the second process in mid-run, and wait for the first to end by itself."""
    pair.wait_for_steps(work() / "doomed", 3, LIMIT)
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

"""How often a step makes the host wait for the device, by place: PyTorch itself says so on a GPU."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.gpu.common import ON_GPU, Job, checked, deepspeed_config, run_jobs, train_command, work
from tests.ranks.waits import OTHERS, Waits, counted_on_cpu, watched

STEPS = (3, 4, 5)
"""Which are counted."""
ACCUMULATION = 2
OURS = {"step.py train_step": 1}
"""Waits of this repository in a step, by place: the reading of its sums. None belongs to a micro-batch, of which a step
has two."""
OF_DEEPSPEED = 12
"""The most of DeepSpeed's in a step: they are theirs, and a new one is worth a look."""


def main() -> None:
    """Train with ZeRO-1 and -3, and hold what was counted against the budget."""
    jobs, told = [], {}
    for stage in (1, 3):
        name = f"waits{stage}"
        told[stage] = work() / f"{name}-counts.json"
        command = train_command(deepspeed_config(name, stage, "bf16"), work() / name, script=str(Path(__file__)))
        jobs.append(Job(name, command, {"COUNTS": str(told[stage])}))
    done = run_jobs(jobs, 40 if ON_GPU else 200)
    for stage, path in told.items():
        with checked(f"waits.zero{stage}") as details:
            done[f"waits{stage}"].expect()
            counts = json.loads(path.read_text())
            details |= {"steps": len(STEPS), "counts": counts}
            assert counts["dialogpt_ds"] == {place: count * len(STEPS) for place, count in OURS.items()}, counts
            assert not counts["transformers"], counts
            assert not counts[OTHERS], counts
            assert sum(counts["deepspeed"].values()) <= OF_DEEPSPEED * len(STEPS), counts


def count() -> int:
    """Be launch/train.py with the waits of some steps counted; returns its exit code."""
    from dialogpt_ds.commands.train import main as train
    from dialogpt_ds.training import loop

    waits, real = Waits(), loop.TrainingRun._step

    def step(self: Any) -> Any:
        if self.state.global_step + 1 not in STEPS:
            return real(self)
        with counted_on_gpu(waits) if ON_GPU else counted_on_cpu(waits):
            return real(self)

    loop.TrainingRun._step = step  # type: ignore[method-assign]
    code = train()
    Path(os.environ["COUNTS"]).write_text(json.dumps(waits.by_owner()))
    return code


@contextmanager
def counted_on_gpu(waits: Waits) -> Iterator[None]:
    """Count what PyTorch warns of, and the full stops that it does not warn of."""
    import torch

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            waits.note()

    with ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(watched(waits, owner, "synchronize"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    if "COUNTS" in os.environ:
        raise SystemExit(count())
    sys.exit(main())

#!/usr/bin/env python3
"""launch/train.py with one fault in one rank, named by FAULT=moment:rank:step; the moments are the functions below."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dialogpt_ds.commands.train import main


def die() -> None:
    """Be killed, as by the kernel that wants memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang_here() -> None:
    """Never come back."""
    while True:
        time.sleep(1)


def before(owner: Any, name: str, fault: Any, when: Any = lambda *a, **k: True) -> None:
    """Let `fault` come before a call of a function for which `when` holds."""
    real = getattr(owner, name)

    def wrapped(*positional: Any, **named: Any) -> Any:
        if when(*positional, **named):
            fault()
        return real(*positional, **named)

    setattr(owner, name, wrapped)


def arm(moment: str, step: int) -> None:
    """Put the fault where it belongs."""
    import torch

    from dialogpt_ds.checkpoints import folder, universal, writer
    from dialogpt_ds.training import evaluation, loop

    def at_step(self: Any, *_: Any, **__: Any) -> bool:
        return self.state.global_step + 1 == step

    if moment == "start":
        before(loop, "start_engine", die)
    elif moment == "step":
        before(loop.TrainingRun, "_report", die, at_step)
    elif moment == "hang":
        before(loop.TrainingRun, "_report", hang_here, at_step)
    elif moment == "save":  # while the files are written
        before(
            writer.SummingEngine,
            "save",
            die,
            lambda *given, **named: f"{step:08d}" in str(named.get("path", given[-1])),
        )
    elif moment == "complete":  # all is written, the name not given
        before(folder.CheckpointFolder, "publish", die, lambda self, unfinished, name: name.endswith(f"{step:08d}"))
    elif moment == "latest":  # between the rename and the pointer
        before(folder.CheckpointFolder, "point", die, lambda self, name, found: found == step)
    elif moment == "rotation":
        before(folder.CheckpointFolder, "rotate", die)
    elif moment == "evaluation":
        count = iter(range(1_000_000))
        before(evaluation, "_any_rank", die, lambda *_: next(count) == step)
    elif moment == "conversion":
        before(universal, "_reshape", die)
    elif moment == "slow-conversion":  # of each tensor, `step` tenths of a second
        before(universal, "_save", lambda: time.sleep(step / 10))
    elif moment == "hanging-conversion":  # at its tensor number `step`
        tensors = iter(range(1_000_000))
        before(universal, "_save", hang_here, lambda *_: next(tensors) == step)
    elif moment == "nan":  # in one rank's gradient
        real = loop.train_step

        def poisoned(engine: Any, *positional: Any, **named: Any) -> Any:
            if engine.global_steps + 1 == step:
                parameter = next(p for p in engine.module.parameters() if p.requires_grad)
                handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
                try:
                    return real(engine, *positional, **named)
                finally:
                    handle.remove()
            return real(engine, *positional, **named)

        loop.train_step = poisoned
    elif moment == "clock":  # set back by an hour, and then a little with every look
        looks, honest = iter(range(1, 1_000_000_000)), time.time
        before(
            loop.TrainingRun, "_step", lambda: setattr(time, "time", lambda: honest() - 3_600 - next(looks)), at_step
        )
    else:
        raise AssertionError(moment)


if __name__ == "__main__":
    moment, rank, step = os.environ["FAULT"].split(":")
    if os.environ.get("RANK") == rank or rank == "all":
        arm(moment, int(step))
    raise SystemExit(main())

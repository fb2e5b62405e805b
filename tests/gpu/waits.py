"""How often a step makes the host wait for the device, by place: PyTorch itself says so on a GPU."""

import collections
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gpu.common import ON_GPU, ROOT, Job, checked, deepspeed_config, run_jobs, train_command, work

STEPS = (3, 4, 5)
"""Which are counted."""
ACCUMULATION = 2
OURS = {"engine.py train_step": 1}
"""Waits of this repository in a step, by place: the reading of its sums. None belongs to a micro-batch, of which a step has two."""
OF_DEEPSPEED = 12
"""The most of DeepSpeed's in a step: they are theirs, and a new one is worth a look."""
BETWEEN = ("dialogpt_ds", "deepspeed", "transformers")


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
            by_owner: dict[str, dict[str, int]] = {owner: {} for owner in (*BETWEEN, "others")}
            for place, count in counts.items():
                owner, _, where = place.partition(": ")
                by_owner[owner][where] = count
            assert by_owner["dialogpt_ds"] == {where: count * len(STEPS) for where, count in OURS.items()}, by_owner
            assert not by_owner["transformers"], by_owner
            assert not by_owner["others"], by_owner
            assert sum(by_owner["deepspeed"].values()) <= OF_DEEPSPEED * len(STEPS), by_owner


class Places:
    """Counts waits by whose code asked."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def note(self) -> None:
        """Count one of where the program stands."""
        for frame in reversed(traceback.extract_stack()):
            owner = owner_of(Path(frame.filename))
            if owner:
                self.counts[f"{owner}: {Path(frame.filename).name} {frame.name}"] += 1
                return
        self.counts["others: ?"] += 1


def owner_of(file: Path) -> str | None:
    """Return whose a source file is, whatever the folders are called in which it was installed or checked out."""
    parts = file.relative_to(ROOT).parts if file.is_relative_to(ROOT) else file.parts
    if "site-packages" in parts:
        parts = parts[parts.index("site-packages") + 1 :]
    return next((name for name in BETWEEN if name in parts), None)


def count() -> int:
    """Be launch/train.py with the waits of some steps counted; returns its exit code."""
    from dialogpt_ds.training import run
    from dialogpt_ds.training.command import main as train

    places, real = Places(), run.TrainingRun._step

    def step(self: Any) -> Any:
        if self.state.global_step + 1 not in STEPS:
            return real(self)
        with on_gpu(places) if ON_GPU else on_cpu(places):
            return real(self)

    run.TrainingRun._step = step  # type: ignore[method-assign]
    code = train()
    Path(os.environ["COUNTS"]).write_text(json.dumps(places.counts))
    return code


@contextmanager
def watched(places: Places, owners: Sequence[Any], name: str) -> Iterator[None]:
    """Count the calls of a function of several owners."""
    real = [getattr(owner, name) for owner in owners]

    def wrapper_of(function: Any) -> Any:
        def wrapper(*positional: Any, **named: Any) -> Any:
            places.note()
            return function(*positional, **named)

        return wrapper

    for owner, function in zip(owners, real, strict=True):
        setattr(owner, name, wrapper_of(function))
    try:
        yield
    finally:
        for owner, function in zip(owners, real, strict=True):
            setattr(owner, name, function)


@contextmanager
def on_gpu(places: Places) -> Iterator[None]:
    """Count what PyTorch warns of, and the full stops that it does not warn of."""
    import torch

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            places.note()

    full_stops = watched(places, (torch.cuda, torch.cuda.Stream, torch.cuda.Event), "synchronize")
    with warnings.catch_warnings(), full_stops:
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def on_cpu(places: Places) -> Iterator[None]:
    """Count the operations whose result the host would have to wait for."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
                places.note()
            return func(*args, **(kwargs or {}))

    with Mode(), watched(places, (torch.Tensor,), "tolist"):  # which is no operation
        yield


if __name__ == "__main__":
    if "COUNTS" in os.environ:
        raise SystemExit(count())
    sys.exit(main())

"""How often an optimizer step would wait for a GPU: counted on a CPU, by what asks the device for a number, and by place."""

import collections
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dialogpt_ds.training.run import TrainingRun
from dialogpt_ds.training.world import World
from tests.helpers.rank_pool import RankPool
from tests.helpers.rank_tasks import write_deepspeed
from tests.helpers.run_tasks import whole_run

SmallWorld = tuple[Path, Path]
ASKING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2", "aten::is_nonzero")
"""Operations whose result, or its shape, the host has to know."""
ACCUMULATION = 3
OF_DEEPSPEED = {1: 6, 3: 3}
"""Waits of DeepSpeed 0.19.8 in a step by ZeRO stage: the norm, whether it is finite, by group. None in a micro-batch."""


class Places(TorchDispatchMode):
    """Counts waits by whose code asked."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ASKING:
            self.note(func._schema.name)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        frames = [
            frame for frame in traceback.extract_stack() if "dialogpt_ds" in frame.filename or "site-packages" in frame.filename
        ]
        frames = [frame for frame in frames if "/torch/" not in frame.filename]
        last = frames[-1]
        owner = "ours" if "dialogpt_ds" in last.filename else last.filename.split("site-packages/")[-1].split("/")[0]
        self.counts[f"{owner}: {what} in {Path(last.filename).name} {last.name}"] += 1


@contextmanager
def counted(places: Places) -> Iterator[None]:
    """Count also what is no operation: a copy from pageable memory, a list of numbers, a full stop."""
    from deepspeed.accelerator import get_accelerator

    patched: list[tuple[Any, str, Any]] = []

    def watch(owner: Any, name: str, when: Any = lambda *_, **__: True) -> None:
        real = getattr(owner, name)
        patched.append((owner, name, real))

        def wrapped(*args: Any, **named: Any) -> Any:
            if when(*args, **named):
                places.note(name)
            return real(*args, **named)

        setattr(owner, name, wrapped)

    watch(torch, "tensor", lambda *_, **named: named.get("device") is not None)
    watch(torch.Tensor, "tolist")
    watch(torch.Tensor, "cpu")
    watch(type(get_accelerator()), "synchronize")
    try:
        with places:
            yield
    finally:
        for owner, name, real in patched:
            setattr(owner, name, real)


def waits_of_a_step(world: World, argv: list[str]) -> dict[str, int]:
    """Run, and return the waits of the third step by place."""
    places, real = Places(), TrainingRun._step

    def step(run: TrainingRun) -> Any:
        if run.state.global_step != 2:
            return real(run)
        with counted(places):
            return real(run)

    TrainingRun._step = step  # type: ignore[method-assign]
    try:
        assert whole_run(world, argv)["code"] == 0
    finally:
        TrainingRun._step = real  # type: ignore[method-assign]
    return dict(places.counts)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_waits_for_the_device_once_and_a_micro_batch_never(
    one_rank: RankPool, two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path, stage: int
) -> None:
    argv = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval", "--num_optim_steps", "4",
            "--lr_schedule", "None", "--train_batch_size", str(2 * ACCUMULATION), "--gradient_accumulation_steps", str(ACCUMULATION),
            "--deepspeed_config", write_deepspeed(tmp_path, stage, "bf16")]  # fmt: skip
    for name, pool in (("one", one_rank), ("two", two_ranks)):
        for counts in pool.run(waits_of_a_step, [*argv, "--output_dir", str(tmp_path / f"{name}")]):
            ours = {place: count for place, count in counts.items() if not place.startswith("deepspeed")}
            assert ours == {"ours: tolist in engine.py train_step": 1}, "the sums of the step; what else is new here waits, too"
            assert sum(counts.values()) - 1 <= OF_DEEPSPEED[stage], counts

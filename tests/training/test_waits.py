"""How often an optimizer step would wait for a GPU: counted on a CPU, by what asks the device for a number, and by
place."""

from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.distributed.world import World
from dialogpt_ds.training.loop import TrainingRun
from tests.ranks.rank_pool import RankPool
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import whole_run
from tests.ranks.waits import Waits, counted_on_cpu

SmallWorld = tuple[Path, Path]
ACCUMULATION = 3
OF_DEEPSPEED = {1: 6, 3: 3}
"""Waits of DeepSpeed 0.19.8 in a step by ZeRO stage: the norm, whether it is finite, by group. None in a
micro-batch."""


def waits_of_a_step(world: World, argv: list[str]) -> dict[str, dict[str, int]]:
    """Run, and return the waits of the third step by owner and place."""
    waits, real = Waits(), TrainingRun._step

    def step(run: TrainingRun) -> Any:
        if run.state.global_step != 2:
            return real(run)
        with counted_on_cpu(waits):
            return real(run)

    TrainingRun._step = step  # type: ignore[method-assign]
    try:
        assert whole_run(world, argv)["code"] == 0
    finally:
        TrainingRun._step = real  # type: ignore[method-assign]
    return waits.by_owner()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_waits_for_the_device_once_and_a_micro_batch_never(
    one_rank: RankPool, two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path, stage: int
) -> None:
    argv = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
            "--num_optim_steps", "4", "--lr_schedule", "None", "--train_batch_size", str(2 * ACCUMULATION),
            "--gradient_accumulation_steps", str(ACCUMULATION),
            "--deepspeed_config", write_deepspeed(tmp_path, stage, "bf16")]  # fmt: skip
    for name, pool in (("one", one_rank), ("two", two_ranks)):
        for counts in pool.run(waits_of_a_step, [*argv, "--output_dir", str(tmp_path / f"{name}")]):
            of_deepspeed = counts.pop("deepspeed")
            ours = {"dialogpt_ds": {"step.py train_step": 1}, "transformers": {}, "others": {}}
            assert counts == ours, "the sums of the step; what else is here waits, too"
            assert sum(of_deepspeed.values()) <= OF_DEEPSPEED[stage], of_deepspeed

"""--hang_timeout holds for every group of processes, those that DeepSpeed makes included."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from dialogpt_ds.distributed.world import SECONDS_AFTER_HANG, WITHOUT_LIMIT, World
from tests.ranks.rank_pool import RankPool
from tests.ranks.rank_tasks import engine_of, settings_of, write_deepspeed

SmallWorld = tuple[Path, Path]


def limits(world: World, argv: list[str]) -> list[timedelta]:
    """Start the engine and return how long a collective may take, by group."""
    from deepspeed.utils import groups
    from torch.distributed.distributed_c10d import _world

    engine = engine_of(settings_of(world, argv))
    assert groups._get_data_parallel_group() in _world.pg_map, "DeepSpeed's own, in which gradients are reduced"
    found = [group._get_backend(torch.device("cpu")).options._timeout for group in _world.pg_map]
    engine.destroy()
    return found


@pytest.mark.parametrize(("hang_timeout", "limit"), [(123.0, 123.0 + SECONDS_AFTER_HANG), (0.0, WITHOUT_LIMIT)])
def test_the_limit_reaches_every_group(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path, hang_timeout: float, limit: float
) -> None:
    argv = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
            "--deepspeed_config", write_deepspeed(tmp_path, 1, "fp32"), "--hang_timeout",
            str(hang_timeout)]  # fmt: skip
    for found in two_ranks.run(limits, argv):
        assert len(found) >= 2
        assert set(found) == {timedelta(seconds=limit)}

"""What a run over two processes looks like where nothing disturbs it."""

from pathlib import Path

import pytest

from tests.clusters.small_run import options
from tests.ranks.launch import deepspeed, run
from tests.ranks.run_tasks import losses_of

NUM_STEPS = 60


@pytest.fixture(scope="session")
def undisturbed_losses(small_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of `options` under the deepspeed launcher with two processes, step by step."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run([*deepspeed(2), *options(small_world, output, NUM_STEPS)])
    assert done.returncode == 0, done.stderr
    return losses_of(output)

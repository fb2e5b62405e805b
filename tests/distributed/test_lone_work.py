"""What rank 0 does alone: the others get what it returns, or hear that it failed."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import RunError
from tests.ranks.rank_pool import RankPool

CPU = torch.device("cpu")


def lone_work(world: World, folder: Path, error: Exception | None, num_words: int) -> tuple[str, str]:
    """Return what a rank gets, or its error's message, and what rank 0 has on its screen."""
    from dialogpt_ds.distributed import lone_work
    from dialogpt_ds.distributed.hang_watch import HangWatch

    def work(tell: Callable[[str], None]) -> str:
        assert world.is_first
        for number in range(num_words):
            tell(f"counting: {number}")
        if error is not None:
            raise error
        return "what was made"

    lone_work.SCREEN_SECONDS, before = 0.0, lone_work.SCREEN_SECONDS
    screen = io.StringIO()
    try:
        with contextlib.redirect_stdout(screen):
            return lone_work.first_works(
                work, "counting", world, HangWatch(folder, world.rank, 0), CPU
            ), screen.getvalue()
    except RunError as failed:
        return str(failed), screen.getvalue()
    finally:
        lone_work.SCREEN_SECONDS = before


def test_all_ranks_get_what_rank_0_makes_and_a_person_sees_it_get_on(two_ranks: RankPool, tmp_path: Path) -> None:
    (first, screen), (second, nothing) = two_ranks.run(lone_work, tmp_path, None, 2)
    assert first == second == "what was made"
    assert screen == "still counting: 0\nstill counting: 1\n"
    assert nothing == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(28, "No space left on device", "/there"),
            "failed while counting: [Errno 28] No space left on device: '/there'",
        ),
        (RuntimeError("PytorchStreamWriter failed"), "failed while counting: RuntimeError: PytorchStreamWriter failed"),
        (RunError("said already"), "said already"),
    ],
)
def test_whatever_rank_0_meets_ends_all_ranks_in_order(
    two_ranks: RankPool, tmp_path: Path, error: Exception, words: str
) -> None:
    assert [said for said, _ in two_ranks.run(lone_work, tmp_path, error, 1)] == [words, words]

"""A rank is killed at a random moment, and the run goes on to the weights of one that nothing happened to."""

import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.conftest import Record
from tests.ranks.launch import Launched, deepspeed, run
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import losses_of, weights_of

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "20"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
STEPS = 12
FAULTS = str(ROOT / "tests" / "ranks" / "train_with_fault.py")
SmallWorld = tuple[Path, Path]


@dataclass(frozen=True)
class Kill:
    """A kill to come."""

    moment: str
    rank: int
    step: int
    """Of the run; for an evaluation the batch, for a kill by the clock tenths of a second."""


MOMENTS = ("start", "step", "save", "complete", "latest", "rotation", "evaluation", "conversion", "any time")
FIRST_RANK_ONLY = ("complete", "latest", "rotation", "conversion")


def kills() -> list[Kill]:
    """Every moment in turn, ranks and steps at random."""
    chance = random.Random(SEED)
    found = []
    for number in range(ROUNDS):
        moment = MOMENTS[number % len(MOMENTS)]
        rank = 0 if moment in FIRST_RANK_ONLY else chance.randrange(2)
        step = chance.randint(1, STEPS)
        if moment in ("save", "complete", "latest"):
            step = chance.choice([3, 6, 9])
        elif moment == "evaluation":
            step = chance.randrange(12)
        elif moment == "any time":
            step = chance.randrange(150)
        found.append(Kill(moment, rank, step))
    return found


class Case:
    """Runs of 12 steps that save every 3 and evaluate every 4."""

    def __init__(self, small_world: SmallWorld, folder: Path, stage: int) -> None:
        self.model, self.shards = small_world
        self.config = write_deepspeed(folder, stage, "bf16")

    def argv(self, output: Path, *more: str) -> list[str]:
        return [
            "--model", str(self.model), "--train_input_file", str(self.shards / "train"),
            "--eval_input_file", str(self.shards / "validation"), "--deepspeed_config", self.config, "--output_dir",
            str(output), "--num_optim_steps", str(STEPS), "--valid_step", "4", "--save_step", "3", "--keep_checkpoints",
            "2", "--lr_schedule", "noam", "--warmup_steps", "4", "--learning_rate", "1e-6", "--train_batch_size", "4",
            *more,
        ]  # fmt: skip


def run_whole(command: list[str]) -> None:
    result = run(command)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def references(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights of runs that nothing happens to, by ZeRO stage; and of one that changes from two processes to one."""
    found = {}
    for stage in (1, 3):
        folder = tmp_path_factory.mktemp(f"reference-{stage}")
        case = Case(small_world, folder, stage)
        run_whole(deepspeed(2) + case.argv(folder / "out"))
        found[str(stage)] = weights_of(folder / "out")
        run_whole(deepspeed(2) + case.argv(folder / "changing", "--num_optim_steps", "6"))
        run_whole(deepspeed(1) + case.argv(folder / "changing", "--train_batch_size", "8"))
        found[f"{stage} on one"] = weights_of(folder / "changing")
    return found


@pytest.mark.parametrize("kill", kills(), ids=lambda kill: f"{kill.moment}-{kill.rank}-{kill.step}")
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    small_world: SmallWorld, references: dict[str, str], tmp_path: Path, kill: Kill, record: Record
) -> None:
    stage = 3 if kill.step % 2 else 1
    case, output = Case(small_world, tmp_path, stage), tmp_path / "out"
    ranks, more = 2, list[str]()
    if kill.moment == "conversion":
        run_whole(deepspeed(2) + case.argv(output, "--num_optim_steps", "6"))
        ranks, more = 1, ["--train_batch_size", "8"]
    environment = {} if kill.moment == "any time" else {"FAULT": f"{kill.moment}:{kill.rank}:{kill.step}"}
    command = deepspeed(ranks, *([FAULTS] if environment else [])) + case.argv(output, *more)
    with Launched(command, tmp_path / "log", environment) as launched:
        if kill.moment == "any time":
            launched.wait_until(lambda: len(launched.ranks()) == 2)
            time.sleep(kill.step / 10)
            if kill.rank < len(launched.ranks()):
                launched.ranks()[kill.rank].kill()
        started = time.monotonic()
        code = launched.wait(timeout=120)
        seconds = time.monotonic() - started
        words = launched.output
    if kill.moment != "any time":
        assert code != 0, f"nothing was killed:\n{words}"
    assert "met an unexpected error" not in words, words
    left = sorted(path.name for path in (output / "checkpoints").glob("*")) if (output / "checkpoints").is_dir() else []
    run_whole(deepspeed(ranks) + case.argv(output, *more))
    expected = references[f"{stage} on one" if kill.moment == "conversion" else str(stage)]
    equal = weights_of(output) == expected
    unit = {"evaluation": "batch", "any time": "tenth of a second"}.get(kill.moment, "step")
    where = f"rank {kill.rank}, {unit} {kill.step}"
    steps = [name.removeprefix("step-0000000").removeprefix("step-000000") for name in left if name.startswith("step-")]
    ended = f"exit {code}" + (f" {seconds:.0f} s after it" if kill.moment == "any time" else "")
    record(
        f"kill -9, {kill.moment} ({where}), ZeRO-{stage}",
        f"{ended}, checkpoints left: {', '.join(steps) or 'none'}; resumed: weights "
        f"{'equal' if equal else 'DIFFERENT'}",
    )
    assert equal
    assert len(losses_of(output)) == STEPS
    assert not [path for path in (output / "checkpoints").iterdir() if path.name.startswith(("unfinished", "replaced"))]
    shutil.rmtree(output)

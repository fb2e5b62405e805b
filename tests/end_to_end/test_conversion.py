"""A conversion that takes longer than --hang_timeout goes on for as long as it gets on; one that hangs is ended."""

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.helpers.output_folder import latest, steps_done
from tests.ranks.launch import Launched, deepspeed, run
from tests.ranks.rank_tasks import write_deepspeed

HANG_TIMEOUT = 6.0
FAULTS = str(Path(__file__).parents[1] / "ranks" / "train_with_fault.py")
SmallWorld = tuple[Path, Path]


def argv(small_world: SmallWorld, output: Path, stage: int, steps: int) -> list[str]:
    (output.parent / f"stage-{stage}").mkdir(exist_ok=True)
    return [
        "--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
        "--output_dir", str(output), "--deepspeed_config", write_deepspeed(output.parent / f"stage-{stage}", stage,
                                                                           "fp32"), "--num_optim_steps", str(steps),
        "--save_step", "2", "--lr_schedule", "None", "--hang_timeout", f"{HANG_TIMEOUT:g}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def saved(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two ranks at stage 1, which stage 3 has to convert."""
    output = tmp_path_factory.mktemp("saved") / "out"
    done = run(deepspeed(2) + argv(small_world, output, 1, 2))
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_a_conversion_that_gets_on_may_take_longer_than_a_hang(
    small_world: SmallWorld, saved: Path, tmp_path: Path
) -> None:
    with safe_open(saved / "model" / "model.safetensors", "pt") as weights:
        num_tensors = 3 * len(weights.keys())
    tenths = int(10 * 2 * HANG_TIMEOUT / num_tensors) + 1
    output = Path(shutil.copytree(saved, tmp_path / "out"))
    fault = {"FAULT": f"slow-conversion:0:{tenths}"}
    with Launched(deepspeed(2, FAULTS) + argv(small_world, output, 3, 4), tmp_path / "log", fault) as launched:
        assert launched.wait(timeout=120) == 0, launched.output
        assert "into DeepSpeed's universal format, once" in launched.output
    assert steps_done(output) == 4


def test_a_conversion_that_hangs_ends_the_run_with_what_each_rank_did(
    small_world: SmallWorld, saved: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(saved, tmp_path / "out"))
    with Launched(
        deepspeed(2, FAULTS) + argv(small_world, output, 3, 4), tmp_path / "log", {"FAULT": "hanging-conversion:0:5"}
    ) as launched:
        assert launched.wait(timeout=120) == 1
        words = launched.output
    doing = rf"converting {output / 'checkpoints' / 'step-00000002'}: "
    assert words.count("nothing has moved for") == 2, words
    assert f"while {doing}" in words
    assert f"while waiting for rank 0, which is {doing}" in words
    assert "hang_here" in (output / "stacks-rank-0.txt").read_text()
    assert "_wait" in (output / "stacks-rank-1.txt").read_text()
    assert latest(output) == 2

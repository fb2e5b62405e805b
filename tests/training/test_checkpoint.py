"""Finding the checkpoint to go on from: what fits, what doesn't and why, and what is deleted."""

import hashlib
import json
from pathlib import Path

import pytest
from dialogpt_ds.training.checkpoint import _rotate, find_checkpoint

from dialogpt_ds.commandline import parse
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.errors import UserError
from dialogpt_ds.order.mixture import MixturePosition, order_state
from dialogpt_ds.order.position import Position
from dialogpt_ds.training.settings import Settings, prepare
from dialogpt_ds.training.world import World
from tests.helpers.rank_tasks import write_deepspeed

SmallWorld = tuple[Path, Path]


def settings_of(small_world: SmallWorld, folder: Path, *more: str, world: int = 1) -> Settings:
    model, shards = small_world
    argv = ["--model", str(model), "--train_input_file", str(shards / "train"), "--skip_eval", "--output_dir", str(folder / "out"),
            "--deepspeed_config", write_deepspeed(folder, 1, "bf16"), *more]  # fmt: skip
    return prepare(parse(TrainingArguments, "test", argv), World(0, world, 0))


def write_checkpoint(settings: Settings, step: int) -> Path:
    """Write a checkpoint folder with one small file, as a finished save leaves it."""
    root = settings.output_dir / "checkpoints"
    folder = root / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"weights")
    place = MixturePosition(step, (Position(0, 0, step),), ((),))
    digest = hashlib.sha256(b"weights").hexdigest()
    summary = {
        "step": step, "world_size": settings.world.size, "zero_stage": 1, "precision": "bf16", "model": settings.model.name,
        "model_shape": settings.model.shape(), "order": order_state(settings.order_key, place),
        "files": {"weights.pt": {"size": 7, "sha256": digest}},
    }  # fmt: skip
    (folder / "checkpoint.json").write_text(json.dumps(summary))
    (root / "latest").write_text(f"{folder.name}\n")
    return folder


def test_the_latest_is_taken_or_the_one_that_is_named(small_world: SmallWorld, tmp_path: Path) -> None:
    settings = settings_of(small_world, tmp_path)
    assert find_checkpoint(settings) is None
    for step in (10, 20):
        write_checkpoint(settings, step)
    found = find_checkpoint(settings)
    assert found is not None
    assert found.step == 20
    found = find_checkpoint(settings_of(small_world, tmp_path, "--continue_from", "10"))
    assert found is not None
    assert found.step == 10


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        (["--resume", "never"], 1, r"--resume never, but .* holds checkpoints \(step-00000010\)"),
        (["--continue_from", "7"], 1, "is no complete checkpoint; there are: step-00000010"),
        ([], 2, "was saved by 1 processes with ZeRO-1 in bf16, this run has 2 with ZeRO-1"),
        (["--seed", "7"], 1, "another order of rows.*\n  seed: checkpoint 42, now 7"),
        (["--packing", "False"], 1, "packed: checkpoint True, now False"),
        (["--max_seq_length", "100"], 1, "row_length: checkpoint 64, now 100"),
        (["--model", "tiny"], 1, "is of model .*\n  hidden_size: checkpoint 32, now 64"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(
    small_world: SmallWorld, tmp_path: Path, options: list[str], world: int, message: str
) -> None:
    write_checkpoint(settings_of(small_world, tmp_path), 10)
    with pytest.raises(UserError, match=message):
        find_checkpoint(settings_of(small_world, tmp_path, *options, world=world))


def test_a_damaged_checkpoint_is_named_with_its_file(small_world: SmallWorld, tmp_path: Path) -> None:
    settings = settings_of(small_world, tmp_path)
    folder = write_checkpoint(settings, 10)
    (folder / "weights.pt").write_bytes(b"weightz")
    with pytest.raises(UserError, match=r"step-00000010 is damaged: weights.pt is"):
        find_checkpoint(settings)
    (folder / "weights.pt").unlink()
    with pytest.raises(UserError, match=r"weights.pt is missing"):
        find_checkpoint(settings)
    (folder / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"is damaged: checkpoint.json can't be read"):
        find_checkpoint(settings)


def test_rotation_keeps_the_newest_and_the_best(small_world: SmallWorld, tmp_path: Path) -> None:
    settings = settings_of(small_world, tmp_path)
    for step in range(1, 7):
        write_checkpoint(settings, step)
    root = settings.output_dir / "checkpoints"
    (root / "best").write_text("step-00000002\n")
    _rotate(root, keep=0)
    assert len(list(root.glob("step-*"))) == 6, "0 keeps all"
    _rotate(root, keep=2)
    assert sorted(path.name for path in root.glob("step-*")) == ["step-00000002", "step-00000005", "step-00000006"]

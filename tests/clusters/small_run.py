"""A run of the very small model that stops and starts as the tests of clusters want it, and what an undisturbed one
looks like."""

from pathlib import Path

from tests.ranks.rank_tasks import write_deepspeed

SmallWorld = tuple[Path, Path]


def options(small_world: SmallWorld, output: Path, steps: int) -> list[str]:
    """Return launch/train.py's arguments; a checkpoint is written when it stops and when it ends."""
    model, shards = small_world
    return [
        "--model", str(model), "--train_input_file", str(shards / "train"), "--output_dir", str(output),
        "--deepspeed_config", write_deepspeed(output.parent, 1, "fp32"), "--num_optim_steps", str(steps),
        "--skip_eval", "--save_step", "1000000", "--lr_schedule", "None", "--learning_rate", "1e-3", "--wandb_mode",
        "disabled",
    ]  # fmt: skip

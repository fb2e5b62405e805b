"""What the output_dir of a run says of it, while it is at work and afterwards."""

from pathlib import Path


def steps_done(output: Path) -> int:
    """Return the number of optimizer steps that its log has."""
    log = output / "train_log.txt"
    return len(log.read_text().splitlines()) - 1 if log.is_file() else 0


def latest(output: Path) -> int:
    """Return the step of its newest checkpoint."""
    return int((output / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))

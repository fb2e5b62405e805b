"""Every combination of ZeRO stage, precision and offload gives ZeRO-0's losses; checkpointed activations and
torch.compile too."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import rank_tasks
from tests.ranks.rank_pool import RankPool

SmallWorld = tuple[Path, Path]
STEPS = 4
CPU = {"device": "cpu"}
OFFLOAD: dict[str, dict[str, Any]] = {
    "": {},
    "optimizer": {"offload_optimizer": CPU},
    "optimizer and weights": {"offload_optimizer": CPU, "offload_param": CPU},
}
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-3, "fp16": 5e-4}
"""Largest difference of a loss of about 5.5 in the first steps; half precision rounds elsewhere in each stage."""


def combinations() -> list[tuple[int, str, str]]:
    """Stage, precision, offload: all that DeepSpeed can run."""
    found = []
    for precision in ("fp32", "bf16", "fp16"):
        for stage in range(4):
            found += [
                (stage, precision, offload) for number, offload in enumerate(OFFLOAD) if number <= (0, 1, 1, 2)[stage]
            ]
    return found


def losses(
    two_ranks: RankPool, small_world: SmallWorld, folder: Path, stage: int, precision: str, offload: str, *options: str
) -> list[float]:
    """Train a few steps on two ranks; returns rank 0's losses, which are all ranks'."""
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000} | OFFLOAD[offload]
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # else every weight of so small a model stays gathered
    fp16 = {"initial_scale_power": 12} if precision == "fp16" else {}
    config = rank_tasks.write_deepspeed(folder, stage, precision, zero_optimization=zero, fp16=fp16)
    argv = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
            "--learning_rate", "1e-3", "--lr_schedule", "None", "--deepspeed_config", config, *options]  # fmt: skip
    task = rank_tasks.losses_in_fp16 if precision == "fp16" else rank_tasks.losses
    first, second = two_ranks.run(task, argv, STEPS, timeout=400)
    assert first == second, "all ranks agree to the bit"
    return first


@pytest.fixture(scope="module")
def reference(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    """ZeRO-0's losses by precision."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        precision: losses(two_ranks, small_world, folder, 0, precision, "") for precision in ("fp32", "bf16", "fp16")
    }


def test_the_reference_learns(reference: dict[str, list[float]]) -> None:
    for precision, found in reference.items():
        assert found[-1] < found[0] - 0.05, precision
        assert found == pytest.approx(reference["fp32"], abs=0.02), precision


@pytest.mark.parametrize(("stage", "precision", "offload"), combinations())
def test_a_combination_gives_the_losses_of_zero_0(
    two_ranks: RankPool,
    small_world: SmallWorld,
    tmp_path: Path,
    reference: dict[str, list[float]],
    stage: int,
    precision: str,
    offload: str,
) -> None:
    found = losses(two_ranks, small_world, tmp_path, stage, precision, offload)
    assert found == pytest.approx(reference[precision], abs=TOLERANCE[precision])


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp16"), (3, "fp32"), (3, "bf16")])
def test_activation_checkpointing_changes_no_loss(
    two_ranks: RankPool,
    small_world: SmallWorld,
    tmp_path: Path,
    reference: dict[str, list[float]],
    stage: int,
    precision: str,
) -> None:
    found = losses(two_ranks, small_world, tmp_path, stage, precision, "", "--activation_checkpointing")
    assert found == pytest.approx(reference[precision], abs=TOLERANCE[precision])


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp16"), (1, "fp32"), (3, "fp32"), (3, "bf16")])
def test_a_chunked_head_changes_no_loss(
    two_ranks: RankPool,
    small_world: SmallWorld,
    tmp_path: Path,
    reference: dict[str, list[float]],
    stage: int,
    precision: str,
) -> None:
    options = ["--chunked_head", "--train_batch_size", "16", "--gradient_accumulation_steps", "1"]
    whole = losses(two_ranks, small_world, tmp_path, stage, precision, "", *options[1:])
    found = losses(two_ranks, small_world, tmp_path, stage, precision, "", *options)
    assert found == pytest.approx(whole, abs=TOLERANCE[precision])
    assert whole != reference[precision]


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (3, "fp32")])
def test_torch_compile_changes_no_loss_beyond_rounding(
    two_ranks: RankPool,
    small_world: SmallWorld,
    tmp_path: Path,
    reference: dict[str, list[float]],
    stage: int,
    precision: str,
) -> None:
    found = losses(two_ranks, small_world, tmp_path, stage, precision, "", "--torch_compile")
    assert found == pytest.approx(reference[precision], abs=TOLERANCE[precision])

"""A run goes on from its checkpoint: bit for bit as it was saved, and within rounding in any other layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.rank_pool import RankPool
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import losses_of, weights_of, whole_run

SmallWorld = tuple[Path, Path]
Pools = dict[int, RankPool]
STAGES = (0, 1, 2, 3)
HALF, WHOLE = 3, 6
"""Optimizer steps before the change, and in all."""
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-4, "fp16": 2e-4}
"""Of losses in another layout; the same layout is held to equality."""


@pytest.fixture(scope="module")
def pools(one_rank: RankPool, two_ranks: RankPool) -> Pools:
    return {1: one_rank, 2: two_ranks}


def fp16_from(power: int) -> dict[str, Any]:
    """Return DeepSpeed's block for a loss scale that begins at 2 ** power."""
    return {"fp16": {"initial_scale_power": power, "hysteresis": 1}}


def num_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def loss_scales_of(output: Path) -> set[float]:
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {m["loss_scale"] for m in metrics if "loss" in m}


class Runs:
    """Runs of one precision on the small world, with 8 rows a step at any world size."""

    def __init__(self, small_world: SmallWorld, folder: Path, precision: str, pools: Pools, **options: Any) -> None:
        self.model, self.shards = small_world
        self.folder, self.precision, self.pools = folder, precision, pools
        self.options = options

    def argv(self, output: Path, stage: int, world: int, steps: int, *more: str) -> list[str]:
        config = write_deepspeed(self.folder, stage, self.precision, **self.options)
        return [
            "--model", str(self.model), "--train_input_file", str(self.shards / "train"), "--skip_eval", "--output_dir",
            str(output), "--deepspeed_config", config, "--num_optim_steps", str(steps), "--save_step", str(HALF),
            "--lr_schedule", "noam", "--warmup_steps", "4", "--learning_rate", "1e-6", "--train_batch_size",
            str(8 // world), "--gradient_accumulation_steps", "1", *more,
        ]  # fmt: skip

    def run(self, output: Path, stage: int, world: int, steps: int, *more: str) -> dict[str, Any]:
        ended = self.pools[world].run(
            whole_run, self.argv(output, stage, world, steps, *more), self.precision == "fp16"
        )
        assert {end["code"] for end in ended} == {0}, ended
        return ended[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_pair_of_stages_at_another_world_size(
    small_world: SmallWorld, pools: Pools, tmp_path: Path, precision: str
) -> None:
    """Two processes to one: the same rows, losses within rounding, group settings and step counts as they were."""
    runs = Runs(small_world, tmp_path, precision, pools, **fp16_from(14))
    whole = runs.run(tmp_path / "whole", 1, 1, WHOLE)
    expected = losses_of(tmp_path / "whole")
    # A scale that was not carried over would begin here.
    after = Runs(small_world, tmp_path, precision, pools, **fp16_from(9))
    for source in STAGES:
        runs.run(tmp_path / f"from-{source}", source, 2, HALF)
        for target in STAGES:
            output = tmp_path / f"{source}-to-{target}"
            shutil.copytree(tmp_path / f"from-{source}", output)
            ended = after.run(output, target, 1, WHOLE)
            pair = f"{precision}: ZeRO-{source} on 2 -> ZeRO-{target} on 1"
            assert loss_scales_of(output) == {2.0**14 if precision == "fp16" else 1.0}, pair
            assert losses_of(output) == pytest.approx(expected, abs=TOLERANCE[precision]), pair
            assert [ended[name] for name in ("groups", "updates", "applied", "skipped")] == [
                whole[name] for name in ("groups", "updates", "applied", "skipped")
            ], pair
            assert not list((output / "checkpoints").glob("universal-*")), (
                "a conversion goes when the next checkpoint is complete"
            )


@pytest.mark.parametrize("stage", STAGES)
def test_there_and_back_again(small_world: SmallWorld, pools: Pools, tmp_path: Path, stage: int) -> None:
    """2 -> 1 -> 2 processes."""
    runs = Runs(small_world, tmp_path, "bf16", pools)
    runs.run(tmp_path / "whole", stage, 2, 9)
    for world, steps in ((2, 3), (1, 6), (2, 9)):
        runs.run(tmp_path / "changing", stage, world, steps)
    assert losses_of(tmp_path / "changing") == pytest.approx(losses_of(tmp_path / "whole"), abs=TOLERANCE["bf16"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_same_layout_goes_on_bit_for_bit(
    small_world: SmallWorld, pools: Pools, tmp_path: Path, precision: str
) -> None:
    # From 2 ** 17 the first updates overflow, so that skipped steps and a falling scale have to survive.
    runs = Runs(small_world, tmp_path, precision, pools, **fp16_from(17))
    for stage in STAGES:
        whole = runs.run(tmp_path / f"whole-{stage}", stage, 2, WHOLE)
        assert (whole["skipped"] > 0) == (precision == "fp16")
        for steps in (HALF, WHOLE):
            runs.run(tmp_path / f"halved-{stage}", stage, 2, steps, "--save_step", "2")
        assert losses_of(tmp_path / f"halved-{stage}") == losses_of(tmp_path / f"whole-{stage}"), (precision, stage)
        assert weights_of(tmp_path / f"halved-{stage}") == weights_of(tmp_path / f"whole-{stage}"), (precision, stage)


def test_dropout_goes_on_bit_for_bit(small_world: SmallWorld, pools: Pools, tmp_path: Path) -> None:
    runs = Runs(small_world, tmp_path, "fp32", pools)
    runs.run(tmp_path / "whole", 1, 2, WHOLE, "--dropout", "0.2")
    for steps in (HALF, WHOLE):
        runs.run(tmp_path / "halved", 1, 2, steps, "--dropout", "0.2")
    assert losses_of(tmp_path / "halved") == losses_of(tmp_path / "whole")
    runs.run(tmp_path / "without", 1, 2, WHOLE)
    assert losses_of(tmp_path / "without")[1:] != losses_of(tmp_path / "whole")[1:]


def test_another_precision_goes_on_from_the_fp32_weights(small_world: SmallWorld, pools: Pools, tmp_path: Path) -> None:
    first = Runs(small_world, tmp_path, "bf16", pools)
    first.run(tmp_path / "whole", 1, 2, WHOLE)
    first.run(tmp_path / "changing", 1, 2, HALF)
    Runs(small_world, tmp_path, "fp32", pools).run(tmp_path / "changing", 1, 2, WHOLE)
    assert losses_of(tmp_path / "changing") == pytest.approx(losses_of(tmp_path / "whole"), abs=2e-3)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_gradients_summed_in_fp32_go_on_in_the_same_and_in_any_other_layout(
    small_world: SmallWorld, pools: Pools, tmp_path: Path, precision: str
) -> None:
    """At stage 1 in bf16 DeepSpeed takes another optimizer for it, with files of its own."""
    summed = {"data_types": {"grad_accum_dtype": "fp32"}} | fp16_from(14)
    (tmp_path / "plain").mkdir()
    runs = Runs(small_world, tmp_path, precision, pools, **summed)
    plain = Runs(small_world, tmp_path / "plain", precision, pools, **fp16_from(14))
    two = ("--gradient_accumulation_steps", "2")
    plain.run(tmp_path / "expected", 1, 2, WHOLE, *two)
    expected = pytest.approx(losses_of(tmp_path / "expected"), abs=1e-3)
    for stage in (1, 2, 3):
        runs.run(tmp_path / f"whole-{stage}", stage, 2, WHOLE, *two)
        assert losses_of(tmp_path / f"whole-{stage}") == expected, stage
        for steps in (HALF, WHOLE):
            runs.run(tmp_path / f"halved-{stage}", stage, 2, steps, *two)
        assert losses_of(tmp_path / f"halved-{stage}") == losses_of(tmp_path / f"whole-{stage}"), stage
        assert weights_of(tmp_path / f"halved-{stage}") == weights_of(tmp_path / f"whole-{stage}"), stage
    for first, source, second, target in (
        (runs, 1, runs, 3),
        (runs, 3, runs, 1),
        (plain, 2, runs, 1),
        (runs, 1, plain, 2),
    ):
        output = tmp_path / f"{source}-{target}-{first is runs}-{second is runs}"
        first.run(output, source, 2, HALF, *two)
        second.run(output, target, 1, WHOLE, *two)
        assert losses_of(output) == expected, output.name


def test_gradients_reduced_while_others_are_computed_are_the_same(
    small_world: SmallWorld, pools: Pools, tmp_path: Path
) -> None:
    """Small buckets, of which several are full before the last gradient is there."""
    found = []
    for overlap in (False, True):
        zero = {"stage": 1, "overlap_comm": overlap, "reduce_bucket_size": 5_000, "allgather_bucket_size": 5_000}
        runs = Runs(small_world, tmp_path, "fp32", pools, zero_optimization=zero)
        runs.run(tmp_path / f"overlap-{overlap}", 1, 2, WHOLE, "--gradient_accumulation_steps", "2")
        found.append((losses_of(tmp_path / f"overlap-{overlap}"), weights_of(tmp_path / f"overlap-{overlap}")))
    assert found[0] == found[1]


@pytest.mark.slow
def test_offloading_the_optimizer_on_the_way(small_world: SmallWorld, pools: Pools, tmp_path: Path) -> None:
    plain = Runs(small_world, tmp_path, "bf16", pools)
    plain.run(tmp_path / "whole", 2, 2, WHOLE)
    plain.run(tmp_path / "changing", 2, 2, HALF)
    (tmp_path / "offload").mkdir()
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    offloading = Runs(small_world, tmp_path / "offload", "bf16", pools, zero_optimization=zero)
    offloading.run(tmp_path / "changing", 2, 2, WHOLE)
    assert losses_of(tmp_path / "changing") == pytest.approx(losses_of(tmp_path / "whole"), abs=TOLERANCE["bf16"])


def test_a_conversion_is_made_once_and_anew_where_it_is_damaged(
    small_world: SmallWorld, pools: Pools, tmp_path: Path
) -> None:
    from dialogpt_ds.checkpoints.folder import CheckpointFolder, Summary
    from dialogpt_ds.checkpoints.universal import convert

    runs = Runs(small_world, tmp_path, "fp32", pools)
    runs.run(tmp_path / "out", 1, 2, HALF)
    folder = CheckpointFolder(tmp_path / "out")
    summary = Summary.read(folder.path(HALF))
    said: list[str] = []
    told: list[str] = []

    def converted() -> tuple[Path, float, list[str]]:
        said.clear()
        path = convert(folder, summary, said.append, told.append)
        return path, (path / "universal.json").stat().st_mtime_ns, list(said)

    path, first, words = converted()
    assert words == [f"converting {folder.path(HALF)} into DeepSpeed's universal format, once"]
    assert [told[0], told[-1]] == [
        f"converting {folder.path(HALF)}: 1 files so far",
        f"reading the conversion of {folder.path(HALF)} for its checksums: {num_files(path) - 1:,} files so far",
    ]
    assert not (path / "tmp").exists()
    assert converted() == (path, first, [])
    tensor = next(path.glob("zero/*/exp_avg.pt"))
    content = bytearray(tensor.read_bytes())
    content[len(content) // 2] ^= 1
    tensor.write_bytes(bytes(content))
    again, second, words = converted()
    assert again == path
    assert second > first
    assert "is made anew: zero/" in words[0]
    # A checkpoint of the same step that was written anew has another conversion.
    content = json.loads((folder.path(HALF) / "checkpoint.json").read_text())
    (folder.path(HALF) / "checkpoint.json").write_text(json.dumps(content | {"model": "another"}))
    assert "it is of another checkpoint" in converted()[2][0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeeds_own_adam_keeps_flat_groups_at_stage_0(
    small_world: SmallWorld, pools: Pools, tmp_path: Path, precision: str
) -> None:
    """As on a GPU: one fp32 tensor per group at stage 0, steps counted in integers."""
    adam = {"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}} | fp16_from(14)
    runs = Runs(small_world, tmp_path, precision, pools, **adam)
    runs.run(tmp_path / "whole", 0, 1, WHOLE)
    for source, target in ((0, 1), (1, 0), (0, 0), (0, 3)):
        output = tmp_path / f"{source}-to-{target}"
        runs.run(output, source, 2, HALF)
        ended = runs.run(output, target, 1, WHOLE)
        assert losses_of(output) == pytest.approx(losses_of(tmp_path / "whole"), abs=TOLERANCE[precision]), (
            source,
            target,
        )
        assert ended["updates"] == WHOLE

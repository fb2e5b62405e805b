"""What ranks do about data that one of them can't read: all stop with one message, or all leave out the same."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.order.windows import EpochPlan
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.settings import order_key
from tests.helpers.damage import damage_member
from tests.helpers.streams import in_small_blocks
from tests.ranks import data_tasks
from tests.ranks.rank_pool import RankPool
from tests.ranks.rank_tasks import write_deepspeed

STEPS = 50


@pytest.fixture(scope="module")
def small_blocks(small_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    """The small world's training shards in blocks of 5 examples: some windows of 64 blocks."""
    return in_small_blocks(small_world[1] / "train", tmp_path_factory.mktemp("blocks") / "data", 5, 200_000)


@pytest.fixture
def copies(small_blocks: ShardDirectory, tmp_path: Path) -> list[ShardDirectory]:
    """A copy for each of two nodes."""
    for name in ("node0", "node1"):
        shutil.copytree(small_blocks.folder, tmp_path / name)
    return [ShardDirectory.open(str(tmp_path / name), "test") for name in ("node0", "node1")]


def plan_of(directory: ShardDirectory) -> EpochPlan:
    return EpochPlan(directory, order_key(directory, 42, 64, packing=True), 0)


def argv_of(small_world: tuple[Path, Path], data: Path, folder: Path, *more: str) -> list[str]:
    return ["--model", str(small_world[0]), "--train_input_file", str(data), "--skip_eval", "--train_batch_size", "8",
            "--deepspeed_config", write_deepspeed(folder, 1, "bf16"), "--output_dir", str(folder / "out"),
            *more]  # fmt: skip


def together(results: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Return the rows of both ranks in order: micro-batches of 4 rows, two of each rank per step."""
    rows = []
    for first, second in zip(results[0]["rows"], results[1]["rows"], strict=True):
        rows += first[:4] + second[:4] + first[4:] + second[4:]
    return rows


def test_the_fixture_has_several_windows(small_blocks: ShardDirectory) -> None:
    assert plan_of(small_blocks).num_windows >= 3


@pytest.mark.parametrize("member", ["tokens.npy", "turn_lengths.npy"])
def test_damage_that_one_rank_alone_meets_stops_both_with_its_message(
    two_ranks: RankPool, small_world: tuple[Path, Path], copies: list[ShardDirectory], tmp_path: Path, member: str
) -> None:
    block = int(plan_of(copies[1]).blocks[70])
    file, offset = damage_member(copies[1], block, member)
    argvs = [argv_of(small_world, copy.folder, tmp_path) for copy in copies]
    first, second = two_ranks.run(data_tasks.take_steps, argvs, STEPS)
    assert first["error"] == second["error"]
    assert f"shard {file}, block {block}, member {block:08d}.{member}, offset {offset:,}: checksum " in first["error"]
    assert ", expected " in first["error"]
    assert "--on_bad_block skip" in first["error"]
    assert 1 <= len(first["rows"]) == len(second["rows"]), "both had the steps before"


@pytest.mark.parametrize("member", ["tokens.npy", "turn_lengths.npy"])
def test_skipping_leaves_out_the_same_on_all_ranks_and_at_any_number_of_them(
    two_ranks: RankPool, small_world: tuple[Path, Path], copies: list[ShardDirectory], tmp_path: Path, member: str
) -> None:
    """One rank meets the damage, the other doesn't; their rows are those of one process that meets it."""
    plan = plan_of(copies[1])
    blocks = [int(plan.blocks[3]), int(plan.blocks[70]), int(plan.blocks[90])]
    for block in blocks:
        damage_member(copies[1], block, member)
    options = ["--on_bad_block", "skip", "--loader_workers", "2"]
    argvs = [argv_of(small_world, copy.folder, tmp_path, *options) for copy in copies]
    results = two_ranks.run(data_tasks.take_steps, argvs, STEPS)
    assert results[0]["error"] is None
    assert results[0]["state"] == results[1]["state"]
    skipped = results[0]["state"]["sources"][0]["skipped_blocks"]
    assert sorted(block for block, *_ in skipped) == sorted(blocks)
    assert all(len(result["said"]) == 2 for result in results), "one warning for each window"
    assert "warning: 1 of " in results[0]["said"][0]
    assert (
        "blocks can't be read and are skipped from here on, 5 examples; 1 blocks with 5 examples in all:"
        in results[0]["said"][0]
    )
    assert "3 blocks with 15 examples in all:" in results[0]["said"][1]
    alone = one_process(small_world, copies[1].folder, tmp_path, options)
    assert together(results) == alone["rows"]
    assert alone["state"] == results[0]["state"]


@pytest.mark.parametrize("on_bad_block", ["stop", "skip"])
def test_a_look_ahead_changes_no_row_and_a_failure_seen_by_it_is_told_before_anybody_computes(
    two_ranks: RankPool, small_world: tuple[Path, Path], copies: list[ShardDirectory], tmp_path: Path, on_bad_block: str
) -> None:
    """As a run does: the next step is looked for while one is computed, and its failure told with the sums of the
    step."""
    damage_member(copies[1], int(plan_of(copies[1]).blocks[70]), "tokens.npy")
    argvs = [argv_of(small_world, copy.folder, tmp_path, "--on_bad_block", on_bad_block) for copy in copies]
    plain = two_ranks.run(data_tasks.take_steps, argvs, STEPS)
    ahead = two_ranks.run(data_tasks.take_steps, argvs, STEPS, [], True)
    for mine, theirs in zip(ahead, plain, strict=True):
        reductions = mine.pop("reductions")
        assert mine == {key: value for key, value in theirs.items() if key != "reductions"}
        assert len(mine["rows"]) > 2
        assert reductions == 1 + (2 if on_bad_block == "skip" else 1), (
            "at the first step, and where something is to be agreed on"
        )
    assert plain[0]["reductions"] >= len(plain[0]["rows"])


def one_process(small_world: tuple[Path, Path], data: Path, folder: Path, options: list[str]) -> dict[str, Any]:
    """The same run in one process: 16 rows a step in its micro-batches."""
    from dialogpt_ds.distributed.world import World
    from dialogpt_ds.order.mixture import MixturePosition, order_state
    from dialogpt_ds.training.data import TrainingData
    from tests.ranks.rank_tasks import settings_of

    settings = settings_of(World(0, 1, 0), [*argv_of(small_world, data, folder, *options), "--train_batch_size", "16"])
    running = TrainingData(settings, MixturePosition.start(), data_tasks.CPU)
    rows = []
    for _ in range(STEPS):
        step, _ = running.next_step()
        rows += [tuple(row) for micro_batch in step.micro_batches for row in micro_batch.input_ids.tolist()]
    running.close()
    return {"rows": rows, "state": order_state(settings.order_key, running.position)}


def test_a_shard_that_vanishes_in_mid_epoch_is_skipped_from_the_step_on_that_misses_it(
    two_ranks: RankPool, small_world: tuple[Path, Path], copies: list[ShardDirectory], tmp_path: Path
) -> None:
    """Without loader processes nothing is read ahead, so the shard goes while a window that needs it is in use."""
    file = copies[0].folder / "shard-000001.tar"
    argv = argv_of(small_world, copies[0].folder, tmp_path, "--on_bad_block", "skip", "--loader_workers", "0")
    first, second = two_ranks.run(data_tasks.take_steps, [argv, argv], STEPS, [(5, str(file))])
    assert (first["error"], first["state"], first["said"]) == (None, second["state"], second["said"])
    assert "can't be opened: [Errno 2] No such file or directory" in first["said"][0]
    assert first["said"][0].count("\n") <= 7, "some of many blocks are named, the others counted"
    skipped = first["state"]["sources"][0]["skipped_blocks"]
    assert {int(copies[0].index.shard[block]) for block, *_ in skipped} == {1}
    intact = one_process(small_world, copies[1].folder, tmp_path, [])["rows"]
    assert together([first, second])[: 5 * 16] == intact[: 5 * 16], "nothing changes before"
    assert together([first, second]) != intact


def test_a_loader_process_that_is_killed_ends_all_ranks(
    two_ranks: RankPool, small_world: tuple[Path, Path], small_blocks: ShardDirectory, tmp_path: Path
) -> None:
    argv = argv_of(small_world, small_blocks.folder, tmp_path)
    first, second = two_ranks.run(data_tasks.kill_a_loader_process, argv)
    assert first == second
    assert "a data loading process ended" in first


def test_ranks_with_different_data_or_settings_are_found_out_before_training(
    two_ranks: RankPool, small_world: tuple[Path, Path], copies: list[ShardDirectory], tmp_path: Path
) -> None:
    same = [argv_of(small_world, copy.folder, tmp_path) for copy in copies]
    assert two_ranks.run(data_tasks.compare_runs, same) == ["", ""], "the same shards in two places"
    other = [same[0], argv_of(small_world, small_world[1] / "train", tmp_path, "--valid_step", "7")]
    said = two_ranks.run(data_tasks.compare_runs, other)
    assert said[0] == said[1]
    assert "train_input_file (fingerprints of its manifests): rank 1\n  valid_step: rank 1" in said[0]


def test_ranks_with_different_code_or_packages_are_found_out_before_training(
    two_ranks: RankPool, small_world: tuple[Path, Path], small_blocks: ShardDirectory, tmp_path: Path
) -> None:
    first, second = two_ranks.run(data_tasks.compare_other_code, argv_of(small_world, small_blocks.folder, tmp_path))
    assert first == second
    assert "version of torch: rank 1\n  code of dialogpt_ds: rank 1\n" in first
    assert "launch/doctor.py --hostfile HOSTS compares them" in first


def test_an_evaluation_that_one_rank_can_not_read_ends_on_all(
    two_ranks: RankPool, small_world: tuple[Path, Path], copies: list[ShardDirectory], tmp_path: Path
) -> None:
    damage_member(copies[1], int(plan_of(copies[1]).blocks[0]), "tokens.npy")
    argvs = []
    for copy in copies:
        argv = argv_of(small_world, copy.folder, tmp_path)
        argv.remove("--skip_eval")
        argvs.append([*argv, "--eval_input_file", str(copy.folder), "--on_bad_block", "skip"])
    first, second = two_ranks.run(data_tasks.evaluation_error, argvs)
    assert first == second
    assert first.startswith("evaluation: shard ")

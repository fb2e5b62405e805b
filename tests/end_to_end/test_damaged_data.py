"""A shard that is damaged while a run is under way, under the real launcher: stopped with one message, mended, gone on;
or skipped."""

import json
import shutil
from pathlib import Path

import pytest

from dialogpt_ds.files import sha256_of_file
from dialogpt_ds.order.windows import EpochPlan
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.settings import order_key
from tests.helpers.damage import damage_member
from tests.helpers.streams import in_small_blocks
from tests.ranks.launch import deepspeed, python, run
from tests.ranks.rank_tasks import write_deepspeed
from tests.servers.file_server import FileServer

SmallWorld = tuple[Path, Path]
STEPS = 24


@pytest.fixture(scope="module")
def small_blocks(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> ShardDirectory:
    """Training shards in so many blocks that the second window begins after about eighteen steps of 16 rows."""
    return in_small_blocks(small_world[1] / "train", tmp_path_factory.mktemp("blocks") / "data", 5, 200_000)


def options(small_world: SmallWorld, data: str, folder: Path, *more: str) -> list[str]:
    return [
        "--model", str(small_world[0]), "--train_input_file", data, "--skip_eval", "--train_batch_size", "8",
        "--deepspeed_config", write_deepspeed(folder, 1, "fp32"), "--output_dir", str(folder / "out"),
        "--num_optim_steps", str(STEPS), "--save_step", "4", "--lr_schedule", "None", "--learning_rate", "1e-3",
        "--loader_workers", "1", *more,
    ]  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [m for m in map(json.loads, lines) if "loss" in m]


def test_a_damaged_block_stops_all_ranks_and_skip_goes_on_from_the_checkpoint(
    small_world: SmallWorld, small_blocks: ShardDirectory, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_blocks.folder, data)
    copy = ShardDirectory.open(str(data), "test")
    plan = EpochPlan(copy, order_key(copy, 42, 64, packing=True), 0)
    block = int(plan.blocks[70])
    file, offset = damage_member(copy, block, "tokens.npy")
    stopped = run(deepspeed(2) + options(small_world, str(data), tmp_path))
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    message = f"run failed: shard {file}, block {block}, member {block:08d}.tokens.npy, offset {offset:,}: checksum "
    assert stopped.stderr.count(message) == 1
    assert "Traceback" not in stopped.stderr
    reached = len(metrics(tmp_path))
    assert 4 < reached < STEPS
    latest = tmp_path / "out" / "checkpoints" / (tmp_path / "out" / "checkpoints" / "latest").read_text().strip()
    summary = json.loads((latest / "checkpoint.json").read_text())
    assert summary["step"] == reached // 4 * 4
    assert all(sha256_of_file(latest / name) == facts["sha256"] for name, facts in summary["files"].items())
    skipped = run(
        deepspeed(2) + options(small_world, str(data), tmp_path, "--resume", "must", "--on_bad_block", "skip")
    )
    assert skipped.returncode == 0, skipped.stdout + skipped.stderr
    assert skipped.stdout.count("warning: 1 of ") == 1
    assert message.removeprefix("run failed: ") in skipped.stdout
    found = metrics(tmp_path)
    assert [m["skipped_blocks"] for m in found] == [0] * reached + [1] * (STEPS - reached)
    assert found[-1]["skipped_examples"] == 5
    alone = tmp_path / "alone"
    alone.mkdir()
    argv = options(small_world, str(data), alone, "--on_bad_block", "skip", "--train_batch_size", "16")
    whole = run(python() + argv)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert [m["loss"] for m in metrics(alone)] == pytest.approx([m["loss"] for m in found], abs=1e-5), (
        "the same training"
    )


def test_a_mixture_of_remote_and_local_shards_trains_like_two_local_ones(
    small_world: SmallWorld, small_blocks: ShardDirectory, tmp_path: Path
) -> None:
    """Under the launcher, with a YAML list; a remote directory's shards are fetched once for both ranks."""
    server = FileServer(small_blocks.folder)
    other = str(small_world[1] / "validation")
    losses = []
    try:
        for number, first in enumerate((server.url, str(small_blocks.folder))):
            folder = tmp_path / str(number)
            folder.mkdir()
            config = folder / "run.yaml"
            config.write_text(f"train_input_file:\n- 3:{first}\n- 1:{other}\ncache_dir: {folder / 'cache'}\n")
            argv = options(small_world, "", folder)
            argv[argv.index("--train_input_file") : argv.index("--train_input_file") + 2] = ["--config", str(config)]
            result = run(deepspeed(2) + argv)
            assert result.returncode == 0, result.stdout + result.stderr
            assert f"train data  {first}: " in result.stdout
            assert "; 3 of 4 rows, all seen after about " in result.stdout
            found = metrics(folder)
            losses.append([m["loss"] for m in found])
            assert all(0 <= m["data_wait_share"] <= 1 for m in found)
            assert found[-1]["epoch_source_1"] > found[-1]["epoch_source_0"] > 0
    finally:
        server.close()
    assert losses[0] == losses[1]
    assert {name: count for name, count in server.asked.items() if name.endswith(".tar")} == {
        entry.url: 1 for entry in small_blocks.manifest.shardlist
    }

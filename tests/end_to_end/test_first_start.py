"""The first start in a new environment, which has to build what ranks on a CPU exchange data with."""

from pathlib import Path

from dialogpt_ds.launching.op_folder import ABOUT
from tests.ranks.launch import Launched, deepspeed
from tests.ranks.rank_tasks import write_deepspeed

BUILDS = (
    "DeepSpeed builds deepspeed_shm_comm (ranks on a CPU exchange data through shared memory) now, once for "
    "this environment, in "
)


def test_a_build_is_said_before_it_starts_and_only_then(small_world: tuple[Path, Path], tmp_path: Path) -> None:
    model, shards = small_world
    argv = ["--model", str(model), "--train_input_file", str(shards / "train"), "--skip_eval", "--num_optim_steps", "2",
            "--deepspeed_config", write_deepspeed(tmp_path, 1, "fp32")]  # fmt: skip
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TORCH_EXTENSIONS_DIR": ""}
    with Launched(
        [*deepspeed(2), *argv, "--output_dir", str(tmp_path / "first")], tmp_path / "first.log", cache
    ) as first:
        first.wait_until(lambda: BUILDS in first.output, 120.0)
        (folder,) = (tmp_path / "cache" / "dialogpt_ds" / "ops").iterdir()
        library = folder / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
        assert not library.exists(), "said before"
        assert first.wait(400.0) == 0, first.output
    assert first.output.count(BUILDS) == 1, "by one rank of the host"
    assert f"{BUILDS}{folder}: about a minute\n" in first.output
    assert library.is_file()
    assert (folder / ABOUT).is_file()
    with Launched(
        [*deepspeed(2), *argv, "--output_dir", str(tmp_path / "second")], tmp_path / "second.log", cache
    ) as second:
        assert second.wait(120.0) == 0, second.output
    assert BUILDS not in second.output

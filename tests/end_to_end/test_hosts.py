"""Processes on several hosts, played by processes that are told so. Real hosts are in tests/multinode."""

from pathlib import Path

from dialogpt_ds.distributed.world import free_port
from tests.ranks.launch import Launched, python, run


def options(small_world: tuple[Path, Path], output: Path) -> list[str]:
    return ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
            "--output_dir", str(output), "--num_optim_steps", "2", "--fp16", "False", "--lr_schedule",
            "None"]  # fmt: skip


def on_two_hosts(small_world: tuple[Path, Path], outputs: list[Path], folder: Path) -> list[tuple[int, str]]:
    """Return exit code and output of a rank on each of two hosts, each with the output_dir that it sees."""
    where = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with (
        Launched(python() + options(small_world, outputs[0]), folder / "log-0", where | {"RANK": "0"}) as first,
        Launched(python() + options(small_world, outputs[1]), folder / "log-1", where | {"RANK": "1"}) as second,
    ):
        return [(first.wait(), first.output), (second.wait(), second.output)]


def test_a_finished_run_that_one_host_alone_sees_is_an_error_and_no_wait(
    small_world: tuple[Path, Path], tmp_path: Path
) -> None:
    done = run(python() + options(small_world, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (first, said), (second, _) = on_two_hosts(small_world, [tmp_path / "out", tmp_path / "elsewhere"], tmp_path)
    assert (first, second) == (2, 2)
    assert "is not one folder for all processes" in said
    for code, said in on_two_hosts(small_world, [tmp_path / "out"] * 2, tmp_path):
        assert code == 0
        assert "Traceback" not in said
    assert "nothing to do" in (tmp_path / "log-0").read_text()

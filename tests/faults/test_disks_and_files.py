"""Disks that fill up or turn read-only, files that are damaged or gone, two runs in one folder, a clock that goes back,
a NaN."""

import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Record
from tests.faults.test_kills import FAULTS, STEPS, Case, run_whole
from tests.helpers.output_folder import steps_done
from tests.helpers.streams import in_small_blocks
from tests.ranks.launch import Launched, deepspeed, run
from tests.ranks.rank_pool import RankPool
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import losses_of, weights_of, whole_run

pytestmark = pytest.mark.slow
SmallWorld = tuple[Path, Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB; skips the test where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def reference(small_world: SmallWorld, two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a run that nothing happens to, by the pool."""
    folder = tmp_path_factory.mktemp("reference")
    (end, _) = two_ranks.run(whole_run, Case(small_world, folder, 1).argv(folder / "out"))
    assert end["code"] == 0, end
    return weights_of(folder / "out")


def long_argv(case: Case, output: Path, steps: int = 300) -> list[str]:
    """Return the arguments of a run that lasts long enough to do something to it."""
    return case.argv(
        output,
        "--num_optim_steps",
        str(steps),
        "--save_step",
        "20",
        "--valid_step",
        str(steps),
        "--wandb_mode",
        "disabled",
    )


def test_a_full_disk_during_saves(small_world: SmallWorld, tmp_path: Path, small_disk: Path, record: Record) -> None:
    """Saves fail and leave nothing, training goes on; when there is room again, so do the checkpoints."""
    case, output = Case(small_world, tmp_path, 1), small_disk / "out"
    ballast = small_disk / "ballast"
    with Launched(deepspeed(2) + long_argv(case, output), tmp_path / "log") as launched:
        launched.wait_until(lambda: (output / "checkpoints" / "latest").exists())
        with open(ballast, "wb") as file:
            try:
                while True:
                    file.write(b"x" * 65_536)
                    file.flush()
            except OSError:
                pass
        launched.wait_until(lambda: launched.output.count("could not be saved: ") >= 2)
        kept = [path for path in (output / "checkpoints").iterdir() if path.is_dir()]
        assert all((path / "checkpoint.json").is_file() for path in kept), "nothing half is left"
        ballast.unlink()
        assert launched.wait() == 0, launched.output
        assert (
            "No space left on device. Nothing of it is left; the last complete checkpoint is untouched"
            in launched.output
        )
        failed = launched.output.count("could not be saved: ")
    assert steps_done(output) == 300, "no line of the log is lost"
    whole = tmp_path / "whole"
    run_whole(deepspeed(2) + long_argv(case, whole))
    assert weights_of(output) == weights_of(whole)
    record(
        "the disk is full during saves",
        f"{failed} saves failed and left nothing; with room again the run ended, weights equal",
    )


def test_a_disk_that_turns_read_only(small_world: SmallWorld, tmp_path: Path, small_disk: Path, record: Record) -> None:
    case, output = Case(small_world, tmp_path, 1), small_disk / "out"
    argv = long_argv(case, output)

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    with Launched(deepspeed(2) + argv, tmp_path / "log") as launched:
        launched.wait_until(lambda: (output / "checkpoints" / "latest").exists())
        # A disk with files open for writing can't be remounted by root; this is what its kernel does to it after an
        # error.
        frozen = subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True)
        if frozen.returncode:
            (output / "checkpoints").rename(output / "elsewhere")
            (output / "checkpoints").write_text("a file where the folder was")
        launched.wait_until(lambda: "could not be saved: " in launched.output)
        if frozen.returncode:
            (output / "checkpoints").unlink()
            (output / "elsewhere").rename(output / "checkpoints")
        else:
            remount("rw")
        assert launched.wait() == 0, launched.output
    how = "read-only for a while" if not frozen.returncode else "without its folder for a while"
    record(f"the checkpoints' disk is {how}", "the saves in between failed and were said; the run ended well")
    remount("ro")
    result = run(deepspeed(2) + case.argv(small_disk / "other"))
    assert result.returncode == 2
    assert "can't be made: Read-only file system" in result.stderr
    result = run([*deepspeed(2), *argv, "--num_optim_steps", "310"])
    assert result.returncode == 2
    assert "can't be written to" in result.stderr
    record("output_dir is read-only at the start", "exit 2, named, nothing started")


@pytest.mark.parametrize("stage", [1, 3])
def test_damaged_files(
    small_world: SmallWorld, two_ranks: RankPool, tmp_path: Path, stage: int, record: Record
) -> None:
    case = Case(small_world, tmp_path, stage)
    (end, _) = two_ranks.run(whole_run, case.argv(tmp_path / "whole"))
    assert end["code"] == 0
    expected = weights_of(tmp_path / "whole")
    (end, _) = two_ranks.run(whole_run, case.argv(tmp_path / "half", "--num_optim_steps", "9", "--valid_step", "12"))
    assert end["code"] == 0
    newest = "checkpoints/step-00000009"
    files = sorted(
        f.relative_to(tmp_path / "half").as_posix() for f in (tmp_path / "half" / newest).rglob("*") if f.is_file()
    )
    for file in [*files, "checkpoints/latest", "checkpoints/best"]:
        for how in ("a bit flipped", "cut in half", "deleted"):
            output = tmp_path / "damaged"
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(tmp_path / "half", output)
            victim = output / file
            content = bytearray(victim.read_bytes())
            if how == "deleted":
                victim.unlink()
            else:
                content[len(content) // 2] ^= 1
                victim.write_bytes(bytes(content if how == "a bit flipped" else content[: len(content) // 2]))
            (end, _) = two_ranks.run(whole_run, case.argv(output))
            assert end["code"] == 0, (file, how, end)
            assert weights_of(output) == expected, (file, how)
            told = any(f"step {9}" in note and "damaged" in note for note in end["notes"])
            assert told == file.startswith(newest), (file, how, end["notes"])
    record(
        f"each of {len(files)} files of a checkpoint flipped, cut, deleted, ZeRO-{stage}",
        "said; went on from the one before; weights equal",
    )
    record(f"latest and best flipped, cut, deleted, ZeRO-{stage}", "went on from the newest; weights equal")


def test_two_runs_on_one_folder(small_world: SmallWorld, tmp_path: Path, record: Record) -> None:
    case, output = Case(small_world, tmp_path, 1), tmp_path / "out"
    with Launched(deepspeed(2) + long_argv(case, output, 100_000), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) > 5)
        second = run(deepspeed(2) + long_argv(case, output, 100_000))
        assert second.returncode == 2, second.stdout
        assert second.stderr.count("another run is at work in it") == 1
        before = steps_done(output)
        launched.wait_until(lambda: steps_done(output) > before)
        (output / "STOP").touch()
        assert launched.wait() == 0
    record("two runs on one output_dir", "the second ends with exit 2 and says why; the first goes on")


def test_a_clock_that_is_set_back(small_world: SmallWorld, tmp_path: Path, reference: str, record: Record) -> None:
    case, output = Case(small_world, tmp_path, 1), tmp_path / "out"
    with Launched(
        deepspeed(2, FAULTS) + case.argv(output, "--save_minutes", "1"), tmp_path / "log", {"FAULT": "clock:all:5"}
    ) as launched:
        assert launched.wait() == 0, launched.output
    seconds = [
        json.loads(line).get("seconds_per_step", 0.0) for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(0 <= value < 60 for value in seconds), seconds
    assert weights_of(output) == reference
    record("the clock is set back by an hour, and then with every look", "no effect; weights equal")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_nan_in_the_gradient_of_one_rank(
    small_world: SmallWorld, tmp_path: Path, stage: int, precision: str, record: Record
) -> None:
    """Its update is left out on all ranks and said, or the run ends; what is saved and exported has no NaN in it."""
    from safetensors.torch import load_file

    case, output = Case(small_world, tmp_path, stage), tmp_path / "out"
    case.config = write_deepspeed(tmp_path, stage, precision)
    with Launched(deepspeed(2, FAULTS) + case.argv(output), tmp_path / "log", {"FAULT": "nan:1:6"}) as launched:
        code = launched.wait()
        words = launched.output
    if code:
        assert "diverged. Nothing of it was saved" in words
        assert (output / "checkpoints" / "latest").read_text().strip() == "step-00000004"
        run_whole(deepspeed(2) + case.argv(output))
        happened = "the run ended and said so; nothing of it was saved; went on without the NaN"
    else:
        assert "gradient of step 6 is not finite; its update was skipped on all ranks" in words, words
        happened = "the update was left out on all ranks, and said"
    assert all(math.isfinite(loss) for loss in losses_of(output))
    assert all(tensor.isfinite().all() for tensor in load_file(output / "model" / "model.safetensors").values())
    record(f"a NaN in rank 1's gradient, ZeRO-{stage}, {precision}", f"exit {code}: {happened}")


def test_shards_that_are_deleted_in_mid_run(
    small_world: SmallWorld, tmp_path: Path, reference: str, record: Record
) -> None:
    case, output = Case(small_world, tmp_path, 1), tmp_path / "out"
    shards = tmp_path / "shards"
    in_small_blocks(small_world[1] / "train", shards, 16, 20_000)
    data = ["--train_input_file", str(shards), "--loader_workers", "0"]
    run_whole([*deepspeed(2), *long_argv(case, tmp_path / "whole", 200), *data])
    with Launched([*deepspeed(2), *long_argv(case, output, 200), *data], tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) > 5)
        files = sorted(shards.glob("shard-*.tar"))
        for file in files:
            file.rename(file.with_suffix(".gone"))
        code = launched.wait()
        words = launched.output
    assert (
        code == 0
        or "The last complete checkpoint is untouched: mend the data and start the same command again" in words
    ), words
    for file in files:
        file.with_suffix(".gone").rename(file)
    run_whole([*deepspeed(2), *long_argv(case, output, 200), *data])
    assert weights_of(output) == weights_of(tmp_path / "whole")
    what = "all ranks ended, the shard was named" if code else "the files that were open were read to the end"
    record(
        f"all {len(files)} shards are deleted in mid-run", f"exit {code}: {what}; with the shards back: weights equal"
    )


def test_a_killed_run_can_be_started_again_at_once(small_world: SmallWorld, tmp_path: Path, record: Record) -> None:
    case, output = Case(small_world, tmp_path, 1), tmp_path / "out"
    with Launched(deepspeed(2) + long_argv(case, output, 100_000), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) > 25)
        for rank in launched.ranks():
            rank.kill()
        started = time.monotonic()
        result = run(
            deepspeed(2)
            + case.argv(output, "--num_optim_steps", "30", "--valid_step", "30", "--wandb_mode", "disabled")
        )
        assert result.returncode == 0, result.stderr
        seconds = time.monotonic() - started
    record("all ranks killed, started again at once", f"went on; {seconds:.0f} s with start-up and {STEPS} steps")

"""Stopping a run that real launchers started: by signals, by a file, by the loss of a process, by a hang."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.output_folder import latest, steps_done
from tests.ranks.launch import Launched, deepspeed, run, torchrun
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import losses_of, weights_of

SmallWorld = tuple[Path, Path]


def options(small_world: SmallWorld, output: Path, *more: str) -> list[str]:
    model, shards = small_world
    return [
        "--model", str(model), "--train_input_file", str(shards / "train"), "--eval_input_file",
        str(shards / "validation"), "--deepspeed_config", write_deepspeed(output.parent, 1, "bf16"), "--output_dir",
        str(output), "--num_optim_steps", "100000", "--valid_step", "100000", "--save_step", "20", "--lr_schedule",
        "None", "--learning_rate", "1e-3", *more,
    ]  # fmt: skip


def check_stopped(launched: Launched, output: Path, reason: str) -> None:
    """The run has saved where it stands, says so once, and nothing of it is left."""
    step = steps_done(output)
    assert launched.output.count(f"stopped by {reason}: step {step:,} of 100,000 is saved in") == 1, launched.output
    assert latest(output) == step
    assert "Traceback" not in launched.output or "ChildFailedError" in launched.output, "torchrun prints one of its own"
    assert not list((output / "checkpoints").glob("unfinished-*"))


@pytest.mark.parametrize(
    ("launcher", "number", "code"),
    [
        (deepspeed, signal.SIGTERM, 75),
        pytest.param(deepspeed, signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(torchrun, signal.SIGUSR1, None, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_rank_stops_all_of_them(
    small_world: SmallWorld, tmp_path: Path, launcher: object, number: signal.Signals, code: int | None
) -> None:
    output = tmp_path / "out"
    with Launched(launcher(2) + options(small_world, output), tmp_path / "log") as launched:  # type: ignore[operator]
        launched.wait_until(lambda: steps_done(output) >= 5)
        launched.ranks()[1].send_signal(number)
        found = launched.wait()
        assert found == code if code is not None else found != 0  # torchrun makes any exit code of a rank its own 1
        check_stopped(launched, output, number.name)


def test_a_stop_file_and_going_on_from_it(small_world: SmallWorld, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Launched(deepspeed(2) + options(small_world, output), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 5)
        (output / "STOP").touch()
        assert launched.wait() == 0
        check_stopped(launched, output, "STOP file")
    assert not (output / "STOP").exists(), "it has done its work"
    steps = steps_done(output) + 3
    more = ["--num_optim_steps", str(steps), "--valid_step", str(steps)]
    assert run([*deepspeed(2), *options(small_world, output), *more]).returncode == 0
    assert run([*deepspeed(2), *options(small_world, tmp_path / "whole"), *more]).returncode == 0
    assert losses_of(output) == losses_of(tmp_path / "whole"), "as if nothing had happened"
    assert weights_of(output) == weights_of(tmp_path / "whole")


def test_a_stop_during_an_evaluation_is_made_up_for(small_world: SmallWorld, tmp_path: Path) -> None:
    output = tmp_path / "out"
    more = ["--num_optim_steps", "8", "--valid_step", "4", "--save_step", "8", "--valid_batch_size", "1"]
    argv = [*options(small_world, output), *more]
    with Launched(deepspeed(2) + argv, tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 4)
        launched.ranks()[0].send_signal(signal.SIGTERM)
        assert launched.wait() == 75
        assert "stopped by SIGTERM: step 4 of 8 is saved" in launched.output
        assert "evaluation at step" not in launched.output
    assert run(deepspeed(2) + argv).returncode == 0
    whole = [*options(small_world, tmp_path / "whole"), *more]
    assert run(deepspeed(2) + whole).returncode == 0
    assert (output / "eval_log.txt").read_text() == (tmp_path / "whole" / "eval_log.txt").read_text()
    assert losses_of(output) == losses_of(tmp_path / "whole")
    # Once more: the evaluation that was made up for is in the checkpoint, and isn't made again.
    again = run([*deepspeed(2), *argv, "--num_optim_steps", "9", "--continue_from", "4"])
    assert again.returncode == 0
    assert "evaluation at step 4" not in again.stdout


@pytest.mark.parametrize("victim", ["runner", pytest.param("launcher", marks=pytest.mark.slow)])
def test_ranks_whose_launcher_is_gone_stop_by_themselves(small_world: SmallWorld, tmp_path: Path, victim: str) -> None:
    """SIGTERM to the runner, or kill -9 to the process below it, ends it alone."""
    output = tmp_path / "out"
    with Launched(deepspeed(2) + options(small_world, output), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 5)
        if victim == "runner":
            os.kill(launched.process.pid, signal.SIGTERM)
        else:
            launched.launcher().kill()
        launched.wait()
        check_stopped(launched, output, "launcher is gone")


@pytest.mark.slow
def test_sigterm_to_the_launcher(small_world: SmallWorld, tmp_path: Path) -> None:
    """It ends the ranks one after another; all of them save together at the first one's."""
    output = tmp_path / "out"
    with Launched(deepspeed(2) + options(small_world, output), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 5)
        launched.launcher().terminate()
        launched.wait(timeout=25)
        check_stopped(launched, output, "SIGTERM")


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_takes_the_others_down_within_seconds(
    small_world: SmallWorld, tmp_path: Path, victim: int
) -> None:
    output = tmp_path / "out"
    with Launched(deepspeed(2) + options(small_world, output), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 25)
        launched.ranks()[victim].kill()
        assert launched.wait(timeout=15) != 0
        assert "Traceback" not in launched.output
        other = 1 - victim
        print(launched.output)
        assert (
            f"rank {other} has lost contact" in launched.output
            or f"rank {other}: ended by the launcher" in launched.output
        )
    assert latest(output) % 20 == 0
    done = run(
        deepspeed(2)
        + options(small_world, output, "--num_optim_steps", "41", "--valid_step", "41", "--save_step", "41")
    )
    assert done.returncode == 0, done.stderr
    assert len(losses_of(output)) == 41


def test_a_rank_that_hangs_ends_the_run_with_stacks_of_all(small_world: SmallWorld, tmp_path: Path) -> None:
    output = tmp_path / "out"
    script = str(Path(__file__).parents[1] / "ranks" / "train_with_fault.py")
    with Launched(
        deepspeed(2, script) + options(small_world, output, "--hang_timeout", "5"),
        tmp_path / "log",
        {"FAULT": "hang:1:25"},
    ) as launched:
        assert launched.wait(timeout=90) == 1
        assert launched.output.count("nothing has moved for") == 2
    for rank, word in ((0, "all_reduce"), (1, "hang_here")):
        stacks = (output / f"stacks-rank-{rank}.txt").read_text()
        assert f"rank {rank} on " in stacks
        assert word in stacks or rank == 0, stacks
        assert "in train_step" in stacks or "in _step" in stacks
    assert latest(output) == 20

"""launch/slurm.sbatch under an srun that starts real tasks: what becomes of a job that is stopped, preempted, cancelled
or wrong."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clusters.fake_slurm import FakeSlurm
from tests.clusters.small_run import SmallWorld, options
from tests.conftest import ROOT
from tests.helpers.output_folder import latest, steps_done
from tests.ranks.launch import Launched, clean_environment
from tests.ranks.run_tasks import losses_of

SCRIPT = ROOT / "launch" / "slurm.sbatch"
Submit = Callable[..., tuple[int, str]]


def started(slurm: FakeSlurm, argv: list[str], log: Path, restarts: int = 0) -> Launched:
    return Launched(["bash", slurm.script(SCRIPT), *argv], log, slurm.environment(restarts))


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", ROOT)


def test_a_job_that_nears_its_limit_goes_back_into_the_queue_and_its_restart_ends_the_same_run(
    small_world: SmallWorld, undisturbed_losses: list[float], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    first, then = FakeSlurm(tmp_path / "slurm", ROOT), FakeSlurm(tmp_path / "slurm2", ROOT, nodes=2)
    with started(first, options(small_world, output, 100_000), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 5)
        first.signal_tasks(signal.SIGUSR1)
        assert launched.wait() == 75
    job = first.environment()["SLURM_JOB_ID"]
    step = steps_done(output)
    assert first.requeues == [f"requeue {job}"], launched.output
    assert f"requeueing job {job} (restart 1); the last checkpoint: step-{step:08d}" in launched.output
    with started(then, options(small_world, output, step + 3), tmp_path / "log2", restarts=1) as launched:
        assert launched.wait() == 0, launched.output
    assert then.requeues == []
    assert steps_done(output) == step + 3
    assert losses_of(output) == undisturbed_losses[: step + 3], (
        "two ranks, and the rows and losses of the deepspeed launcher's"
    )


@pytest.mark.slow
def test_a_mistake_is_exit_code_2_and_is_not_requeued(
    small_world: SmallWorld, tmp_path: Path, slurm: FakeSlurm
) -> None:
    argv = [*options(small_world, tmp_path / "out", 5), "--expect_world_size", "16"]
    with started(slurm, argv, tmp_path / "log") as launched:
        assert launched.wait() == 2
    assert launched.output.startswith("error: --expect_world_size 16, but 2 processes were started"), launched.output
    assert "Traceback" not in launched.output
    assert slurm.requeues == []


@pytest.mark.slow
def test_a_preemption_signals_the_batch_script_too_which_waits_for_the_checkpoint(
    small_world: SmallWorld, tmp_path: Path, slurm: FakeSlurm
) -> None:
    output = tmp_path / "out"
    with started(slurm, options(small_world, output, 100_000), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 5)
        os.kill(launched.process.pid, signal.SIGTERM)
        slurm.signal_tasks(signal.SIGTERM)
        assert launched.wait() == 75
    assert len(slurm.requeues) == 1
    assert latest(output) == steps_done(output)


@pytest.mark.slow
def test_a_stop_file_ends_the_job_for_good(small_world: SmallWorld, tmp_path: Path, slurm: FakeSlurm) -> None:
    output = tmp_path / "out"
    with started(slurm, options(small_world, output, 100_000), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 5)
        (output / "STOP").touch()
        assert launched.wait() == 0
    assert slurm.requeues == []


# What follows is about the script's own decisions: its tasks are a shell script in place of the trainer.


@pytest.fixture
def submit(tmp_path: Path, slurm: FakeSlurm) -> Submit:
    """Run the script to its end over tasks that run some lines of shell; returns its exit code and what it printed."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)

    def run_script(tasks: str, *argv: str, restarts: int = 0, **more: str) -> tuple[int, str]:
        python.write_text(f"#!/bin/bash\n{tasks}\n")
        python.chmod(0o755)
        argv = argv or ("--output_dir", str(tmp_path / "out"))
        environment = clean_environment() | slurm.environment(restarts) | {"VENV": str(tmp_path / "venv")} | more
        done = subprocess.run(
            ["bash", slurm.script(SCRIPT), *argv],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr

    return run_script


def saving(output: Path, step: int) -> str:
    return f"mkdir -p {output}/checkpoints; echo step-{step} > {output}/checkpoints/latest;"


@pytest.mark.parametrize(
    ("codes", "code", "requeues"),
    [
        ((0, 0), 0, 0),
        ((75, 75), 75, 1),
        ((2, 2), 2, 0),
        ((1, 1), 1, 0),
        ((137, 1), 137, 0),
        pytest.param((143, 143), 143, 1, id="stopped before it could listen"),
        pytest.param((138, 75), 138, 1, id="one was not listening yet"),
    ],
)
def test_only_a_stop_is_requeued(
    submit: Submit, slurm: FakeSlurm, codes: tuple[int, int], code: int, requeues: int
) -> None:
    found, output = submit(f"codes=({codes[0]} {codes[1]}); exit ${{codes[$SLURM_PROCID]}}")
    assert (found, len(slurm.requeues)) == (code, requeues), output


def test_the_slower_task_is_not_ended_when_the_faster_one_is_through_with_its_stop(
    submit: Submit, slurm: FakeSlurm, tmp_path: Path
) -> None:
    """srun's kill-on-bad-exit would end it, and say 143 where 2 or 75 was meant."""
    code, output = submit(f"sleep $SLURM_PROCID; touch {tmp_path}/done-$SLURM_PROCID; exit 2")
    assert code == 2, output
    assert (tmp_path / "done-1").exists()


def test_a_cancelled_job_stays_cancelled(submit: Submit, slurm: FakeSlurm) -> None:
    slurm.is_now("COMPLETING")
    code, output = submit("exit 75")
    assert (code, slurm.requeues) == (75, []), output
    assert "is COMPLETING: not requeued from here" in output


def test_starts_that_get_nowhere_are_not_repeated_for_ever(submit: Submit, slurm: FakeSlurm, tmp_path: Path) -> None:
    for restarts in range(2):
        assert submit("exit 75", restarts=restarts)[0] == 75
    code, output = submit("exit 75", restarts=2)
    assert (code, len(slurm.requeues)) == (75, 2)
    assert "error: 3 starts in a row were stopped before a new checkpoint (the last one: none): not requeued" in output
    # One that a person submits begins to count anew, and so does one that got further.
    assert "requeueing" in submit("exit 75")[1]
    assert "requeueing" in submit("exit 75", restarts=1)[1]
    assert "requeueing" in submit(saving(tmp_path / "out", 5) + "exit 75", restarts=2)[1]
    for restarts in (3, 4):
        assert "requeueing" in submit("exit 75", restarts=restarts)[1]
    assert "not requeued" in submit("exit 75", restarts=5)[1]


@pytest.mark.parametrize("to_script", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_batch_script_does_not_end_it_before_its_tasks(
    slurm: FakeSlurm, tmp_path: Path, to_script: signal.Signals
) -> None:
    """SIGTERM comes to all of a job; SIGUSR1 comes to the script alone where it is submitted with
    --signal=B:USR1@180."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\n" + TASK_THAT_SAVES_FOR_A_SECOND)
    python.chmod(0o755)
    environment = slurm.environment() | {"VENV": str(tmp_path / "venv"), "MARKS": str(tmp_path)}
    with Launched(
        ["bash", slurm.script(SCRIPT), "--output_dir", str(tmp_path / "out")], tmp_path / "log", environment
    ) as launched:
        launched.wait_until(lambda: all((tmp_path / f"listens-{number}").exists() for number in range(2)))
        os.kill(launched.process.pid, to_script)
        if to_script == signal.SIGTERM:
            slurm.signal_tasks(signal.SIGTERM)
        assert launched.wait(timeout=20) == 75, launched.output
    assert all((tmp_path / f"saved-{number}").exists() for number in range(2))
    assert len(slurm.requeues) == 1


TASK_THAT_SAVES_FOR_A_SECOND = """
import os, pathlib, signal, sys, time
def mark(what):
    pathlib.Path(os.environ["MARKS"], what + "-" + os.environ["SLURM_PROCID"]).touch()
def save(number, frame):
    time.sleep(1)
    mark("saved")
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
mark("listens")
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("argv", "more", "message"),
    [
        (["--model", "tiny"], {}, "--output_dir is not on the command line"),
        ([], {"SLURM_JOB_ID": ""}, "this is a batch script: sbatch launch/slurm.sbatch"),
        ([], {"SLURM_SUBMIT_DIR": "/"}, "/ has no launch/train.py: call sbatch in the checkout"),
        ([], {"VENV": "/nowhere"}, "/nowhere/bin/python is missing"),
    ],
)
def test_what_would_fail_on_every_node_is_refused_first(
    submit: Submit, slurm: FakeSlurm, argv: list[str], more: dict[str, str], message: str
) -> None:
    code, output = submit("exit 0", *argv, **more)
    assert code == 2
    assert message in output
    assert not (slurm.folder / "tasks").exists(), "nothing was started"


def test_all_arguments_reach_the_tasks_as_they_were_written(submit: Submit, tmp_path: Path) -> None:
    argv = [f"--output_dir={tmp_path / 'my models'}", "--sample_prompts", "Does money buy happiness?", ""]
    code, output = submit("printf '<%s>' \"$@\"; exit 0", *argv)
    words = ["launch/train.py", "--expect_world_size", "2", *argv]
    assert code == 0
    assert output.count("".join(f"<{word}>" for word in words)) == 2, output


def test_the_header_asks_for_one_task_per_gpu_and_for_a_signal_to_them() -> None:
    lines = [line.removeprefix("#SBATCH --") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    header = {name: value for name, _, value in (line.partition("=") for line in lines)}
    assert header["ntasks-per-node"] == header["gpus-per-node"]
    name, seconds = header["signal"].split("@")
    assert name == "USR1"  # with B: it would go to the batch script alone
    assert int(seconds) >= 120
    assert "requeue" in header
    assert header["open-mode"] == "append"

"""A launcher under launch/stoppable.py: what SIGTERM to it comes to, as an ordinary process and as a container's first
one."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dialogpt_ds.launching.stoppable import STOP_SECONDS
from tests.conftest import ROOT
from tests.helpers.output_folder import latest, steps_done
from tests.helpers.terminal import Terminal
from tests.ranks.launch import Launched, deepspeed, python, run, torchrun
from tests.ranks.rank_tasks import write_deepspeed

SmallWorld = tuple[Path, Path]
STOPPABLE = [sys.executable, str(ROOT / "launch" / "stoppable.py")]
NEW_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="a PID namespace is made by root with util-linux's unshare",
)
LISTENER = """
import signal, sys, time
def heard(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number in ENDS:
        sys.exit(ENDS[number])
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, heard)
print("listens", flush=True)
while True:
    time.sleep(0.05)
"""
"""A process that catches what a rank catches, says so, and ends with a code at some of it."""


def listener(**ends: int) -> list[str]:
    """Return the command of a process that ends with a code at a signal: `listener(SIGUSR1=75)`."""
    table = {getattr(signal, name).value: code for name, code in ends.items()}
    return [sys.executable, "-c", LISTENER.replace("ENDS", repr(table))]


def options(small_world: SmallWorld, output: Path, *more: str) -> list[str]:
    model, shards = small_world
    return [
        "--model", str(model), "--train_input_file", str(shards / "train"), "--skip_eval",
        "--deepspeed_config", write_deepspeed(output.parent, 1, "bf16"), "--output_dir", str(output),
        "--num_optim_steps", "100000", "--valid_step", "100000", "--wandb_mode", "disabled", "--lr_schedule", "None",
        "--learning_rate", "1e-3", *more,
    ]  # fmt: skip


def train_until_signalled(
    launched: Launched, output: Path, number: signal.Signals, receiver: Callable[[], psutil.Process] | None = None
) -> int:
    """Let a run make a few steps, send the signal to the stoppable process alone, and return the command's exit
    code."""
    launched.wait_until(lambda: steps_done(output) >= 5)
    process = receiver() if receiver else psutil.Process(launched.process.pid)
    process.send_signal(number)
    return launched.wait(STOP_SECONDS + 30)


def check_saved(launched: Launched, output: Path, reason: str = "SIGUSR1") -> None:
    assert f"stopped by {reason}: step {steps_done(output):,} of 100,000 is saved in" in launched.output, (
        launched.output
    )
    assert latest(output) == steps_done(output)
    assert not list((output / "checkpoints").glob("unfinished-*"))
    assert "SIGKILL" not in launched.output


def test_sigterm_ends_a_deepspeed_run_with_a_checkpoint_and_75(small_world: SmallWorld, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Launched([*STOPPABLE, *deepspeed(2), *options(small_world, output)], tmp_path / "log") as launched:
        assert train_until_signalled(launched, output, signal.SIGTERM) == 75, launched.output
        check_saved(launched, output)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, lambda _: python()], ids=["torchrun", "python"])
def test_sigterm_ends_a_run_of_another_launcher_with_75_too(
    small_world: SmallWorld, tmp_path: Path, launcher: Callable[[int], list[str]]
) -> None:
    output = tmp_path / "out"
    with Launched([*STOPPABLE, *launcher(2), *options(small_world, output)], tmp_path / "log") as launched:
        assert train_until_signalled(launched, output, signal.SIGTERM) == 75, launched.output
        check_saved(launched, output)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_sigint_ends_a_run_for_good(
    small_world: SmallWorld, tmp_path: Path, launcher: Callable[[int], list[str]]
) -> None:
    output = tmp_path / "out"
    with Launched([*STOPPABLE, *launcher(2), *options(small_world, output)], tmp_path / "log") as launched:
        assert train_until_signalled(launched, output, signal.SIGINT) == 0, launched.output
        check_saved(launched, output, "SIGINT")


@pytest.mark.slow
@needs_namespaces
def test_as_the_first_process_of_a_container_and_the_same_command_goes_on(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [*NEW_NAMESPACE, *STOPPABLE, *deepspeed(2), *options(small_world, output)]
    with Launched(command, tmp_path / "log") as launched:

        def first_process() -> psutil.Process:
            return psutil.Process(launched.process.pid).children()[0]

        assert train_until_signalled(launched, output, signal.SIGTERM, first_process) == 75, launched.output
        check_saved(launched, output)
    again = run(
        [
            *NEW_NAMESPACE,
            *STOPPABLE,
            *deepspeed(2),
            *options(small_world, output, "--num_optim_steps", str(latest(output) + 3)),
        ]
    )
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.slow
def test_sigterm_before_the_ranks_are_up_ends_everything_at_once(small_world: SmallWorld, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Launched([*STOPPABLE, *deepspeed(2), *options(small_world, output)], tmp_path / "log") as launched:
        launched.wait_until(
            lambda: len(launched.ranks()) == 2
        )  # started, and a good ten seconds of imports from listening
        launched.process.send_signal(signal.SIGTERM)
        assert launched.wait(STOP_SECONDS) == 128 + signal.SIGTERM, launched.output
        assert "SIGTERM while nothing trains" in launched.output
        assert "SIGKILL" not in launched.output
    assert not output.exists() or not (output / "checkpoints").exists()


@pytest.mark.slow
def test_a_mistake_under_the_launcher_keeps_its_exit_code(small_world: SmallWorld, tmp_path: Path) -> None:
    finished = run([*STOPPABLE, *deepspeed(2), *options(small_world, tmp_path / "out", "--resume", "must")])
    assert finished.returncode == 2, finished.stdout + finished.stderr


def test_a_mistake_keeps_its_exit_code(tmp_path: Path) -> None:
    finished = run([*STOPPABLE, *python(), "--no_such_option"])
    assert finished.returncode == 2
    assert "no_such_option" in finished.stderr


def test_a_command_that_is_not_there_is_a_mistake() -> None:
    finished = run([*STOPPABLE, "no-such-command"])
    assert finished.returncode == 2
    assert "error: command no-such-command: cannot be started (No such file or directory)" in finished.stderr


def test_no_command_is_a_mistake() -> None:
    assert run([*STOPPABLE, "--grace_seconds", "5"]).returncode == 2


def test_one_training_process_hears_of_the_first_signal_the_group_of_the_second_and_nobody_of_a_third(
    tmp_path: Path,
) -> None:
    with Launched([*STOPPABLE, *listener()], tmp_path / "log") as launched:
        launched.wait_until(lambda: "listens" in launched.output)
        for said in ("SIGUSR1\n", "SIGTERM once more: SIGTERM to the command"):
            launched.process.send_signal(signal.SIGTERM)
            launched.wait_until(lambda said=said: said in launched.output)  # type: ignore[misc]
        launched.wait_until(lambda: "\nSIGTERM\n" in launched.output)
        launched.process.send_signal(signal.SIGTERM)
        # The third has been taken in before a fourth that means something: SIGKILL of the listener ends both.
        launched.wait_until(lambda: signal.SIGTERM not in pending(launched.process.pid))
        launched.descendants()[0].kill()
        assert launched.wait() == 128 + signal.SIGKILL
        heard = [line for line in launched.output.splitlines() if line.startswith("SIG")]
        assert heard == ["SIGUSR1", "SIGTERM"]


def pending(pid: int) -> set[int]:
    """Return the signals that have come to a process and were not taken in yet."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line for line in lines if line.startswith("ShdPnd:")).split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_the_first_of_two_ranks_is_asked_and_programs_that_catch_everything_are_not(tmp_path: Path) -> None:
    shell = f'trap "echo shell heard" USR1; "{sys.executable}" -c "$0" & "{sys.executable}" -c "$0" & wait; wait'
    with Launched(
        [*STOPPABLE, "bash", "-c", shell, LISTENER.replace("ENDS", "{10: 75, 15: 3}")], tmp_path / "log"
    ) as launched:
        launched.wait_until(lambda: launched.output.count("listens") == 2)
        launched.process.send_signal(signal.SIGTERM)
        launched.wait_until(lambda: "SIGUSR1" in launched.output)
        launched.process.send_signal(signal.SIGTERM)
        launched.wait()
        assert launched.output.count("SIGUSR1\n") == 1
        assert "shell heard" not in launched.output


def test_what_does_not_end_is_killed_when_the_grace_is_over(tmp_path: Path) -> None:
    with Launched([*STOPPABLE, "--grace_seconds", "1", *listener()], tmp_path / "log") as launched:
        launched.wait_until(lambda: "listens" in launched.output)
        started = time.monotonic()
        launched.process.send_signal(signal.SIGTERM)
        assert launched.wait() == 128 + signal.SIGKILL
        assert 1 <= time.monotonic() - started < 10
        assert "1 s are over: SIGKILL to 1 processes" in launched.output


def test_a_signal_while_nothing_trains_reaches_the_whole_group(tmp_path: Path) -> None:
    with Launched([*STOPPABLE, "bash", "-c", "sleep 600 & sleep 600 & echo up; wait"], tmp_path / "log") as launched:
        launched.wait_until(lambda: "up" in launched.output and len(launched.descendants()) == 3)
        launched.process.send_signal(signal.SIGTERM)
        assert launched.wait(10) == 128 + signal.SIGTERM


def test_a_rank_that_outlives_its_launcher_may_save_and_other_leftovers_are_ended(tmp_path: Path) -> None:
    saver = 'LOCAL_RANK=0 bash -c "sleep 2; echo saved" & sleep 600 & exit 143'
    with Launched([*STOPPABLE, "bash", "-c", saver], tmp_path / "log") as launched:
        assert launched.wait(20) == 143
        assert "saved" in launched.output


@pytest.mark.slow
def test_a_command_that_goes_on_after_its_ranks_have_stopped_is_ended(tmp_path: Path) -> None:
    """As an ssh server does, whose sessions the ranks of one host of several are."""
    script = f'LOCAL_RANK=0 "{sys.executable}" -c "$0"; echo "ended with $?"; sleep 600'
    with Launched(
        [*STOPPABLE, "bash", "-c", script, LISTENER.replace("ENDS", "{10: 75}")], tmp_path / "log"
    ) as launched:
        launched.wait_until(lambda: "listens" in launched.output)
        launched.process.send_signal(signal.SIGTERM)
        assert launched.wait() == 75
        assert "ended with 75" in launched.output
        assert "the ranks have stopped and the command goes on" in launched.output


def test_typing_and_ctrl_c_in_a_terminal_are_the_commands() -> None:
    """As with docker run --interactive --tty."""
    with Terminal([*STOPPABLE, "bash", "-c", 'read -p "say: " word; echo "said $word"; sleep 600']) as terminal:
        terminal.wait_for("say:")
        terminal.send("hello\n")
        terminal.wait_for("said hello")
        terminal.send("\x03")
        assert terminal.wait() == 128 + signal.SIGINT


@needs_namespaces
def test_the_first_process_takes_in_orphans(tmp_path: Path) -> None:
    orphan = (
        "(sleep 0.1 & echo $! > {0}/pid) & wait; until [ ! -e /proc/$(cat {0}/pid) ]; do sleep 0.05; done; echo "
        "taken in"
    )
    finished = run([*NEW_NAMESPACE, *STOPPABLE, "timeout", "20", "bash", "-c", orphan.format(tmp_path)])
    assert finished.stdout == "taken in\n", "a process that nobody waits for stays in /proc as a zombie"
    assert finished.returncode == 0

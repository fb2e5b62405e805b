"""Runs over two hosts: the losses of one host, and an end in bounded time when a host or the network between them is
lost."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dialogpt_ds.checkpoints.folder import CheckpointFolder, Summary, sums_of
from tests.conftest import ROOT
from tests.helpers.output_folder import steps_done
from tests.hosts.two_hosts import ADDRESSES, NAMES, TwoHosts
from tests.multinode.conftest import Record, RecordLosses
from tests.ranks.launch import BIN, TRAIN, TRAIN_FP16_ON_CPU, Launched, deepspeed, run
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import losses_of, weights_of

pytestmark = pytest.mark.multinode

HOSTFILE = "launch/hostfile.example"
STEPS = {"bf16": 60, "fp16": 12}
ENDLESS = ["--num_optim_steps", "100000", "--valid_step", "100000"]
CONTACT_SECONDS = 10
KEEP_ALIVE = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"}
ROUNDING = 2e-3
"""Of a loss of 2.8 after 50 steps in bf16 on one process instead of two, as in tests/training/test_matrix.py."""

SmallWorld = tuple[Path, Path]


def over_both(script: str = TRAIN, hostfile: str = HOSTFILE) -> list[str]:
    """Return the launcher's command with the example's host file as it stands, and one of its slots on each host."""
    return [str(BIN / "deepspeed"), "--hostfile", hostfile, "--num_gpus", "1", script]


class Case:
    """Runs of one ZeRO stage and precision, which save every 10 steps."""

    def __init__(self, small_world: SmallWorld, folder: Path, stage: int, precision: str = "bf16") -> None:
        self.model, self.shards = small_world
        self.steps = STEPS[precision]
        # From 2**19 the first updates overflow and are left out; stage 3 would keep weights this small gathered on all
        # ranks.
        fp16 = {"initial_scale_power": 19, "hysteresis": 1} if precision == "fp16" else {}
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        self.config = write_deepspeed(folder, stage, precision, zero_optimization=zero, fp16=fp16)
        self.script = TRAIN_FP16_ON_CPU if precision == "fp16" else TRAIN

    def argv(self, output: Path, *more: str) -> list[str]:
        return [
            "--model", str(self.model), "--train_input_file", str(self.shards / "train"),
            "--eval_input_file", str(self.shards / "validation"), "--deepspeed_config", self.config, "--output_dir",
            str(output), "--num_optim_steps", str(self.steps), "--valid_step", str(self.steps), "--save_step", "10",
            "--lr_schedule", "None", "--learning_rate", "1e-3", "--contact_timeout", str(CONTACT_SECONDS), *more,
        ]  # fmt: skip


Reference = Callable[[int, str], Path]


@pytest.fixture(scope="session")
def one_host(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Give the output folder of a run of two processes on one host that nothing happens to, by stage and precision; run
    once."""
    found: dict[tuple[int, str], Path] = {}

    def output_of(stage: int, precision: str) -> Path:
        if (stage, precision) not in found:
            folder = tmp_path_factory.mktemp(f"one-host-{stage}-{precision}")
            case = Case(small_world, folder, stage, precision)
            result = run(deepspeed(2, case.script) + case.argv(folder / "out"))
            assert result.returncode == 0, result.stdout + result.stderr
            found[stage, precision] = folder / "out"
        return found[stage, precision]

    return output_of


def check_last_checkpoint(output: Path) -> int:
    """The newest checkpoint is named and every byte of it is there; returns its step."""
    folder = CheckpointFolder(output)
    step = folder.steps()[-1]
    assert folder.pointer("latest") == step
    path = folder.path(step)
    summary = Summary.read(path)
    assert summary.files
    for name, sums in summary.files.items():
        assert sums_of(path / name) == sums, name
    return step


def check_resumes_on_one_host(case: Case, output: Path, expected: list[float]) -> None:
    """One process with as many rows goes on to the losses of the run that nothing happened to."""
    step = check_last_checkpoint(output)
    done = run(deepspeed(1, case.script) + case.argv(output, "--train_batch_size", "8", "--resume", "must"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed     from step {step}" in done.stdout
    losses = losses_of(output)
    assert losses[:step] == expected[:step]
    assert losses[step] == pytest.approx(expected[step], abs=1e-5), "the same weights and the same rows"
    assert losses == pytest.approx(expected, abs=ROUNDING)
    assert len(losses) == case.steps


def check_resumes_on_both(hosts: TwoHosts, case: Case, output: Path, expected: list[float], log: Path) -> None:
    """The same command on both hosts goes on to the same losses, bit for bit."""
    check_last_checkpoint(output)
    with hosts.first.launch(over_both(case.script) + case.argv(output, "--resume", "must"), log) as launched:
        assert launched.wait(timeout=120) == 0, launched.output
        hosts.wait_until_quiet(10)
    assert losses_of(output) == expected


def end_of(hosts: TwoHosts, launched: Launched, timeout: float) -> tuple[int, float]:
    """Wait for the end of everything on both hosts; returns the launcher's exit code and how many seconds all of it
    took."""
    started = time.monotonic()
    code = launched.wait(timeout)
    hosts.wait_until_quiet(timeout)
    return code, time.monotonic() - started


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_hosts_train_as_one_does(
    hosts: TwoHosts,
    small_world: SmallWorld,
    one_host: Reference,
    tmp_path: Path,
    stage: int,
    precision: str,
    record_losses: RecordLosses,
) -> None:
    case, output = Case(small_world, tmp_path, stage, precision), tmp_path / "out"
    with hosts.first.launch(over_both(case.script) + case.argv(output), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 1)
        assert [len(host.ranks()) for host in (hosts.first, hosts.second)] == [1, 1]
        assert launched.wait(timeout=120) == 0, launched.output
        hosts.wait_until_quiet(10)
    reference = one_host(stage, precision)
    one, two = losses_of(reference), losses_of(output)
    record_losses(f"ZeRO-{stage} {precision}", one, two)
    assert len(two) == case.steps
    assert two == one, "bit for bit"
    assert weights_of(output) == weights_of(reference)
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    skipped = max(row.get("skipped_steps", 0) for row in metrics)
    assert (skipped > 0) == (precision == "fp16"), "the loss scaler has had work to do"


@pytest.mark.parametrize("victim", [1, 0])
def test_a_host_whose_ranks_are_killed_ends_the_run(
    hosts: TwoHosts, small_world: SmallWorld, one_host: Reference, tmp_path: Path, victim: int, record: Record
) -> None:
    case, output = Case(small_world, tmp_path, 3), tmp_path / "out"
    with hosts.first.launch(over_both() + case.argv(output, *ENDLESS), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 15)
        (hosts.first, hosts.second)[victim].kill_ranks()
        code, seconds = end_of(hosts, launched, timeout=30)
        assert code != 0, launched.output
        other = 1 - victim
        (said,) = re.findall(
            rf"^{NAMES[other]}: .*run failed: rank {other}.* has lost .*", launched.output, re.MULTILINE
        )
        assert NAMES[victim] in said or ADDRESSES[victim] in said, said
        assert "Traceback" not in launched.output
    step = check_last_checkpoint(output)
    record(
        f"kill -9 of the ranks of {NAMES[victim]}",
        f"all ended in {seconds:.1f} s, exit code {code}, checkpoint of step {step} whole",
    )
    check_resumes_on_one_host(case, output, losses_of(one_host(3, "bf16")))


def test_a_link_that_is_cut_ends_the_run_on_both_sides(
    hosts: TwoHosts, small_world: SmallWorld, one_host: Reference, tmp_path: Path, record: Record
) -> None:
    case, output = Case(small_world, tmp_path, 1), tmp_path / "out"
    with hosts.first.launch(over_both() + case.argv(output, *ENDLESS), tmp_path / "log", KEEP_ALIVE) as launched:
        launched.wait_until(lambda: steps_done(output) >= 15)
        hosts.cut()
        started = time.monotonic()
        hosts.second.wait_until_quiet(60)
        alone = time.monotonic() - started
        code, _ = end_of(hosts, launched, timeout=60)
        seconds = time.monotonic() - started
    assert code != 0
    assert (
        f"run failed: rank 0 on {NAMES[0]} has lost {NAMES[1]} (rank 1): no answer for {CONTACT_SECONDS} s"
        in launched.output
    )
    step = check_last_checkpoint(output)
    record(
        f"{NAMES[1]} cut off the network (--contact_timeout {CONTACT_SECONDS})",
        f"ended there in {alone:.1f} s, everywhere in {seconds:.1f} s, exit code {code}, checkpoint of step {step} "
        "whole",
    )
    hosts.join()
    expected = losses_of(one_host(1, "bf16"))
    shutil.copytree(output, tmp_path / "copy")
    check_resumes_on_both(hosts, case, output, expected, tmp_path / "log-resumed")
    check_resumes_on_one_host(case, tmp_path / "copy", expected)


@pytest.mark.parametrize(("how", "expected"), [("STOP file", 0), ("SIGUSR1", 75), ("SIGINT", 1)])
def test_a_stop_of_both_hosts(
    hosts: TwoHosts,
    small_world: SmallWorld,
    one_host: Reference,
    tmp_path: Path,
    how: str,
    expected: int,
    record: Record,
) -> None:
    """A STOP file, a signal to a rank, Ctrl-C; the launcher makes any end of its own after Ctrl-C 1."""
    case, output = Case(small_world, tmp_path, 2), tmp_path / "out"
    with hosts.first.launch(over_both() + case.argv(output, *ENDLESS), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 15)
        if how == "STOP file":
            (output / "STOP").touch()
        elif how == "SIGUSR1":
            hosts.second.ranks()[0].send_signal(signal.SIGUSR1)
        else:
            os.killpg(leader(launched).pid, signal.SIGINT)
        code, seconds = end_of(hosts, launched, timeout=40)
        if how != "SIGINT":  # then ssh is gone before the ranks have saved
            assert f"{NAMES[0]}: stopped by {how}: step {steps_done(output)} of 100,000 is saved" in launched.output
    step = check_last_checkpoint(output)
    record(
        f"stopped by {how}",
        f"all ended in {seconds:.1f} s, exit code {code}, step {steps_done(output)} done, {step} saved",
    )
    assert code == expected, launched.output
    assert step == steps_done(output)
    if how == "SIGINT":
        check_resumes_on_both(hosts, case, output, losses_of(one_host(2, "bf16")), tmp_path / "log-resumed")


def test_a_launcher_that_is_killed_leaves_nobody_training(
    hosts: TwoHosts, small_world: SmallWorld, tmp_path: Path, record: Record
) -> None:
    """As when the machine goes down on which the run was started: its ssh sessions end without a word to what they had
    started."""
    case, output = Case(small_world, tmp_path, 1), tmp_path / "out"
    with hosts.first.launch(over_both() + case.argv(output, *ENDLESS), tmp_path / "log") as launched:
        launched.wait_until(lambda: steps_done(output) >= 15)
        for process in launched.descendants():
            process.kill()
        _, seconds = end_of(hosts, launched, timeout=40)
    step = check_last_checkpoint(output)
    record(
        "kill -9 of deepspeed, pdsh and ssh",
        f"all ended in {seconds:.1f} s, step {steps_done(output)} done, {step} saved",
    )
    assert step == steps_done(output)


def leader(launched: Launched) -> psutil.Process:
    """Return the deepspeed command, which leads a process group of its own, as under a shell."""
    return next(process for process in launched.descendants() if os.getpgid(process.pid) == process.pid)


def test_a_host_that_is_not_there(hosts: TwoHosts, small_world: SmallWorld, tmp_path: Path, record: Record) -> None:
    """The launcher goes on without it; the others say that they wait, and give up."""
    case, hostfile, variables = Case(small_world, tmp_path, 1), tmp_path / "hosts", tmp_path / "deepspeed_env"
    hostfile.write_text((ROOT / HOSTFILE).read_text().replace(NAMES[1], "worker-7"))
    variables.write_text("DEEPSPEED_TIMEOUT=1\n")  # minutes
    command = over_both(hostfile=str(hostfile)) + case.argv(tmp_path / "out")
    with hosts.first.launch(command, tmp_path / "log", {"DS_ENV_FILE": str(variables)}) as launched:
        code, seconds = end_of(hosts, launched, timeout=150)
    record(
        "a name in the host file that is not there (DEEPSPEED_TIMEOUT=1)",
        f"all ended in {seconds:.1f} s, exit code {code}",
    )
    assert code != 0
    assert "Could not resolve hostname worker-7" in launched.output
    assert f"rank 0 on {NAMES[0]} waits at {ADDRESSES[0]}:29500 for the other processes, 2 in all" in launched.output
    assert f"run failed: rank 0 on {NAMES[0]} has waited" in launched.output


def test_a_mistake_on_the_command_line(
    hosts: TwoHosts, small_world: SmallWorld, tmp_path: Path, record: Record
) -> None:
    case = Case(small_world, tmp_path, 1)
    command = over_both() + case.argv(tmp_path / "out", "--expect_world_size", "16")
    with hosts.first.launch(command, tmp_path / "log") as launched:
        code, seconds = end_of(hosts, launched, timeout=60)
    record("--expect_world_size 16 on two processes", f"all ended in {seconds:.1f} s, start included, exit code {code}")
    assert code == 2, launched.output
    assert f"{NAMES[0]}: error: --expect_world_size 16, but 2 processes were started" in launched.output


def by_hand(number: int) -> list[str]:
    """Return the command for one of the hosts, started without ssh."""
    command = [
        str(BIN / "deepspeed"),
        "--hostfile",
        HOSTFILE,
        "--num_gpus",
        "1",
        "--no_ssh",
        "--node_rank",
        str(number),
    ]
    return [*command, "--master_addr", ADDRESSES[0], TRAIN]


@pytest.mark.parametrize(("how", "expected"), [("the end", 0), ("SIGTERM", 75), ("a mistake", 2)])
def test_a_launcher_on_each_host(
    hosts: TwoHosts,
    small_world: SmallWorld,
    one_host: Reference,
    tmp_path: Path,
    how: str,
    expected: int,
    record: Record,
) -> None:
    """As in a cluster of containers, where something else starts the same command everywhere."""
    case, output = Case(small_world, tmp_path, 1), tmp_path / "out"
    more = {"the end": [], "SIGTERM": ENDLESS, "a mistake": ["--train_batch_size", "3"]}[how]
    launched = [
        host.launch(by_hand(number) + case.argv(output, *more), tmp_path / f"log-{number}")
        for number, host in enumerate((hosts.first, hosts.second))
    ]
    with launched[0], launched[1]:
        if how == "SIGTERM":
            launched[0].wait_until(lambda: steps_done(output) >= 15)
            hosts.second.ranks()[0].terminate()
        ends = [end_of(hosts, command, timeout=120) for command in launched]
    record(f"--no_ssh on each host, {how}", f"exit codes {', '.join(str(code) for code, _ in ends)}")
    assert [code for code, _ in ends] == [expected, expected]
    if how == "the end":
        assert losses_of(output) == losses_of(one_host(1, "bf16"))
    elif how == "SIGTERM":
        assert check_last_checkpoint(output) == steps_done(output)

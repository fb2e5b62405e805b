"""launch/slurm.sbatch under a real SLURM, where one is installed: that what the fake one does is what SLURM does."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.real_slurm import RealSlurm, wait_until, what_is_missing
from tests.clusters.small_run import SmallWorld, options
from tests.conftest import ROOT
from tests.helpers.output_folder import latest, steps_done
from tests.ranks.run_tasks import losses_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSlurm]:
    with RealSlurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


def submitted(slurm: RealSlurm, folder: Path, argv: list[str]) -> str:
    """Submit the script without its line about GPUs, for two nodes with a task each; returns the job's number."""
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines(keepends=True)
    script = folder / "slurm.sbatch"
    script.write_text("".join(line for line in lines if not line.startswith("#SBATCH --gpus-per-node")))
    asked = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10", f"--output={folder}/log"]
    # The nodes' names mean nothing outside of SLURM.
    variables = {"VENV": sys.prefix, "MASTER_ADDR": "127.0.0.1"}
    answer = slurm.say("sbatch", "--parsable", *asked, str(script), *argv, variables=variables)
    return answer.partition(";")[0]


def test_a_signalled_job_is_requeued_and_goes_on_and_a_cancelled_one_is_not(
    slurm: RealSlurm, small_world: SmallWorld, undisturbed_losses: list[float], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = submitted(slurm, tmp_path, options(small_world, output, 100_000))
    wait_until(lambda: steps_done(output) >= 5, 120)
    slurm.say(
        "scancel", f"--signal={signal.SIGUSR1.name}", job
    )  # to the tasks alone, as --signal does before the limit
    wait_until(lambda: slurm.state(job) == ("PENDING", 1), 60)
    step = latest(output)
    assert step == steps_done(output)
    slurm.say("scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait for two minutes
    wait_until(lambda: steps_done(output) >= step + 5, 120)
    assert slurm.state(job) == ("RUNNING", 1)
    slurm.say("scancel", job)
    wait_until(lambda: slurm.state(job)[0] == "CANCELLED", 60)
    assert latest(output) == steps_done(output)
    found = losses_of(output)
    assert found[: len(undisturbed_losses)] == undisturbed_losses[: len(found)]
    assert f"requeueing job {job} (restart 1)" in (tmp_path / "log").read_text()


def test_a_mistake_fails_the_job_with_2(slurm: RealSlurm, small_world: SmallWorld, tmp_path: Path) -> None:
    job = submitted(slurm, tmp_path, [*options(small_world, tmp_path / "out", 4), "--train_input_file", os.devnull])
    wait_until(lambda: slurm.state(job)[0] == "FAILED", 120)
    assert "ExitCode=2:0" in slurm.say("scontrol", "show", "job", job)

"""What tests of the data of a run do on the ranks of a pool: each rank may have a copy of its own."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import RunError
from dialogpt_ds.order.mixture import MixturePosition, order_state
from dialogpt_ds.training.data import TrainingData
from dialogpt_ds.training.rank_checks import check_same_run
from tests.ranks.rank_tasks import engine_of, settings_of

CPU = torch.device("cpu")


def take_steps(
    world: World, argvs: list[list[str]], steps: int, unlink: Sequence[tuple[int, str]] = (), look_ahead: bool = False
) -> dict[str, Any]:
    """Take steps without training on them; returns the rows, what was said, the state, the error that ended it, and the
    reductions.

    Args:
        world: this rank's.
        argvs: a command line per rank.
        steps: how many.
        unlink: (step, file) to be deleted by rank 0 before that step.
        look_ahead: look for the next step's rows in each step, as a run does while the device computes.
    """
    from dialogpt_ds.training import data as module

    settings = settings_of(world, argvs[world.rank])
    data = TrainingData(settings, MixturePosition.start(len(settings.directories)), CPU)
    rows, said, error, asked, real = [], [], None, [], module.gather_reports
    module.gather_reports = lambda *arguments: (asked.append(1), real(*arguments))[1]
    try:
        for number in range(steps):
            for at, file in unlink:
                if at == number and world.is_first:
                    Path(file).unlink()
            torch.distributed.barrier()
            step, warnings = data.next_step()
            rows.append([tuple(row) for micro_batch in step.micro_batches for row in micro_batch.input_ids.tolist()])
            said += warnings
            if look_ahead:
                failed = torch.tensor(float(data.look_ahead()))
                torch.distributed.all_reduce(failed)
                if not failed.item():
                    data.nobody_failed()
    except RunError as raised:
        error = str(raised)
    finally:
        module.gather_reports = real
    data.close()
    state = order_state(settings.order_key, data.position)
    return {"rows": rows, "said": said, "error": error, "state": state, "reductions": len(asked)}


def kill_a_loader_process(world: World, argv: list[str]) -> str:
    """Take a step, kill rank 1's loader process, and take steps until they end; returns why."""
    settings = settings_of(world, argv)
    before = {child.pid for child in psutil.Process().children()}
    data = TrainingData(settings, MixturePosition.start(), CPU)
    data.next_step()
    if world.rank == 1:
        (loader,) = [child for child in psutil.Process().children() if child.pid not in before]
        os.kill(loader.pid, signal.SIGKILL)
    try:
        for _ in range(1_000):
            data.next_step()
    except RunError as error:
        return str(error)
    finally:
        data.close()
    raise AssertionError("nothing was noticed")


def compare_runs(world: World, argvs: list[list[str]]) -> str:
    """Return what is said of ranks with these command lines, one each; empty where they agree."""
    try:
        check_same_run(settings_of(world, argvs[world.rank]), None)
    except RunError as error:
        return str(error)
    return ""


def compare_other_code(world: World, argv: list[str]) -> str:
    """Return what is said where rank 1 has another torch and another copy of the code."""
    from dialogpt_ds.training import rank_checks

    real = rank_checks.versions, rank_checks.code_sha256
    try:
        if world.rank == 1:
            rank_checks.versions = lambda: real[0]() | {"torch": "2.12.1"}
            rank_checks.code_sha256 = lambda: "0" * 64
        return compare_runs(world, [argv, argv])
    finally:
        rank_checks.versions, rank_checks.code_sha256 = real


def evaluation_error(world: World, argvs: list[list[str]]) -> str:
    """Return why an evaluation ended; each rank with its own command line."""
    from dialogpt_ds.order.stream import RowStream
    from dialogpt_ds.training.evaluation import evaluate
    from dialogpt_ds.training.settings import order_key

    settings = settings_of(world, argvs[world.rank])
    engine = engine_of(settings)
    assert settings.evaluation is not None
    stream = RowStream(settings.evaluation, order_key(settings.evaluation, 0, settings.row_length, True))
    try:
        evaluate(engine, stream, world, 4, settings.train.manifest.eos_id, CPU, False)
    except RunError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def renames_error(world: World, argv: list[str]) -> str:
    """Return what is said of an output_dir that is there."""
    from dialogpt_ds.errors import UserError
    from dialogpt_ds.training.rank_checks import check_renames

    try:
        check_renames(settings_of(world, argv).output_dir, world.is_first)
    except UserError as error:
        return str(error)
    return ""


def shared_disk_error(world: World, argvs: list[list[str]]) -> str:
    """Return what is said of an output_dir; each rank with its own command line."""
    from dialogpt_ds.errors import UserError
    from dialogpt_ds.training import rank_checks

    settings = settings_of(world, argvs[world.rank])
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    patience, rank_checks.TOKEN_SECONDS = rank_checks.TOKEN_SECONDS, 1.0
    try:
        rank_checks.check_shared(settings.output_dir, world.is_first)
    except UserError as error:
        return str(error)
    finally:
        rank_checks.TOKEN_SECONDS = patience
    return ""

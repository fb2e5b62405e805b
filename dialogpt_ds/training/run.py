"""The whole of a run on one rank: it meets the others, trains with them, and parts from them in good order."""

import os
import sys
import traceback
from typing import NoReturn

import torch

from dialogpt_ds.distributed.collectives import all_gather
from dialogpt_ds.distributed.hang_watch import HangWatch
from dialogpt_ds.distributed.host_watch import HostWatch
from dialogpt_ds.distributed.stop_requests import StopRequests
from dialogpt_ds.distributed.world import join_world, leave_world
from dialogpt_ds.errors import EXIT_DONE, EXIT_RUN_FAILED, RunError, UserError, first_line
from dialogpt_ds.redaction import without_secrets
from dialogpt_ds.training.engine import model_of
from dialogpt_ds.training.loop import TrainingRun
from dialogpt_ds.training.rank_checks import check_renames, check_shared
from dialogpt_ds.training.settings import Settings

LOST_CONTACT = (
    "closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "NCCL",
    "DistBackendError",
)
"""What gloo and NCCL say where another rank is gone."""


def confirm_finished(settings: Settings) -> None:
    """Make sure that all hosts see the finished run that this one sees; else those that don't would wait for it.
    Collective.

    Raises:
        UserError: on every rank; output_dir is not one folder for all hosts.
        RunError: the processes did not come together.
    """
    join_world(settings.world, settings.arguments.verbose, settings.arguments.hang_timeout)
    try:
        check_shared(settings.output_dir, settings.world.is_first)  # the first thing that train() does, too
    finally:
        leave_world(None)


def train(settings: Settings) -> int:
    """Run to the end; returns the exit code. Collective: every rank must call."""
    run: TrainingRun | None = None
    torch.manual_seed(settings.arguments.seed)
    # Weights that don't fit are a mistake, and mistakes are said before the ranks come together.
    model = model_of(settings)
    device = join_world(settings.world, settings.arguments.verbose, settings.arguments.hang_timeout)
    with (
        StopRequests(settings.output_dir, settings.world.is_first) as requests,
        HangWatch(settings.output_dir, settings.world.rank, settings.arguments.hang_timeout) as watch,
        HostWatch(settings.world, settings.arguments.contact_timeout) as contact,
    ):
        try:
            check_shared(settings.output_dir, settings.world.is_first)  # first, as confirm_finished() does
            check_renames(settings.output_dir, settings.world.is_first)
            notes = contact.connect()
            run = TrainingRun(settings, requests, watch, model, device)
            run.notes += notes
            code = run.run()
            requests.carry_out()
            watch.beat("leaving")
            if code != EXIT_DONE:
                run.close(code)
                all_gather(None)  # a launcher ends rank 0 as soon as another rank has ended with a code that is not 0
            leave_world(run.engine)
        except (UserError, RunError):
            # Raised on all ranks, so they can part in order.
            if run is not None:
                run.data.close()
            leave_world(run.engine if run is not None else None)
            if run is not None:
                run.close(EXIT_RUN_FAILED)  # the other ranks wait a while before they end
            raise
        except Exception as error:
            # In here, where the launcher's SIGTERM does not yet end this rank before it has spoken.
            abort_rank(error, settings.world.rank, settings.arguments.verbose, contact)
    run.close(code)  # out here, where Ctrl-C ends it
    return code


def abort_rank(error: Exception, rank: int, verbose: bool, contact: HostWatch) -> NoReturn:
    """End this rank at once: what went wrong here, the others don't know of, and anything done together would wait for
    them."""
    if isinstance(error, RuntimeError) and any(words in f"{type(error).__name__} {error}" for words in LOST_CONTACT):
        print(
            f"run failed: rank {rank} has lost contact with {contact.lost() or 'another rank'}, which has ended or "
            "can't be reached; its own message, if it had time for one, stands above. The last complete checkpoint is "
            f"kept: the same command goes on from it. ({without_secrets(first_line(error)[:200])})",
            file=sys.stderr,
        )
        if verbose:
            print(without_secrets(traceback.format_exc()), file=sys.stderr)
    else:
        print(f"run failed: rank {rank} met an unexpected error:", file=sys.stderr)
        print(without_secrets(traceback.format_exc()), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_RUN_FAILED)

"""The whole of a run on one rank: it meets the others, trains with them, and parts from them in good order."""

import torch

from dialogpt_ds.distributed.collectives import all_gathered
from dialogpt_ds.distributed.hang_watch import HangWatch
from dialogpt_ds.distributed.host_watch import HostContact
from dialogpt_ds.distributed.stop_requests import StopRequests
from dialogpt_ds.distributed.world import join_world, leave_world
from dialogpt_ds.errors import EXIT_DONE, EXIT_RUN_FAILED, RunError, UserError
from dialogpt_ds.training.ending import end_alone
from dialogpt_ds.training.loop import TrainingRun
from dialogpt_ds.training.resume import check_renames, check_shared
from dialogpt_ds.training.settings import Settings, model_of


def confirm_finished(settings: Settings) -> None:
    """Make sure that all hosts see the finished run that this one sees; else those that don't would wait for it. Collective.

    Raises:
        UserError: on every rank; output_dir is not one folder for all hosts.
        RunError: the processes did not come together.
    """
    join_world(settings.world, settings.arguments.verbose, settings.arguments.hang_timeout)
    try:
        check_shared(settings)  # the first thing that train() does, too
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
        HostContact(settings.world, settings.arguments.contact_timeout) as contact,
    ):
        try:
            check_shared(settings)  # first, as confirm_finished() does
            check_renames(settings)
            notes = contact.connect()
            run = TrainingRun(settings, requests, watch, model, device)
            run.notes += notes
            code = run.run()
            requests.carry_out()
            watch.beat("leaving")
            if code != EXIT_DONE:
                run.part(code)
                all_gathered(None)  # a launcher ends rank 0 as soon as another rank has ended with a code that is not 0
            leave_world(run.engine)
        except (UserError, RunError):
            # Raised on all ranks, so they can part in order.
            if run is not None:
                run.data.close()
            leave_world(run.engine if run is not None else None)
            if run is not None:
                run.part(EXIT_RUN_FAILED)  # the other ranks wait a while before they end
            raise
        except Exception as error:
            # In here, where the launcher's SIGTERM does not yet end this rank before it has spoken.
            end_alone(error, settings, contact)
    run.part(code)  # out here, where Ctrl-C ends it
    return code

"""The training command: launch/train.py and dialogpt-train."""

import io
import json
import sys
from typing import TYPE_CHECKING

from dialogpt_ds.commandline import make_folder, parse, quiet_libraries, run_command
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.distributed.rank_output import mark_lines_of
from dialogpt_ds.distributed.world import (
    World,
    check_world,
    compute_deterministically,
    prepare_cpu,
    prepare_environment,
    ranks_here,
    spans_hosts,
    with_own_device,
    world_from_environment,
)
from dialogpt_ds.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from dialogpt_ds.hardware import device_of_run
from dialogpt_ds.launching.machine_facts import cpu_is_meant
from dialogpt_ds.launching.op_folder import build_notice
from dialogpt_ds.launching.processes import adopt_scheduler
from dialogpt_ds.logs.tensorboard import require_tensorboard
from dialogpt_ds.redaction import without_secrets
from dialogpt_ds.training.machine import LaunchedRank, machine_troubles

if TYPE_CHECKING:
    from dialogpt_ds.training.settings import Settings


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a reply may have what a terminal's encoding lacks
    try:
        adopt_scheduler()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    world = world_from_environment()
    prepare_environment(world)
    mark_lines_of(world)
    return run_command(lambda: _train(argv, world), world.is_first)


def _train(argv: list[str] | None, world: World) -> int:
    parsed = parse(TrainingArguments, "Train a dialogue response model with DeepSpeed.", argv)
    arguments = parsed.arguments
    if arguments.dry_run:
        world = World(world.rank, arguments.expect_world_size or world.size, world.local_rank)
    else:
        check_world(world, arguments.expect_world_size)
        world = with_own_device(world)
    on_cpu_by_choice = cpu_is_meant()
    if not arguments.verbose:
        quiet_libraries()
    from dialogpt_ds.training.settings import prepare

    settings = prepare(parsed, world)
    if arguments.gpu:
        from dialogpt_ds.training.planning import check_gpu

        check_gpu(settings)
    if arguments.print_config or arguments.plot_schedule or arguments.dry_run:
        if world.is_first:
            show(settings)
        return EXIT_DONE
    return _run(settings, on_cpu_by_choice)


def _run(settings: "Settings", on_cpu_by_choice: bool) -> int:
    """Train as the settings say, or see that it was done before; returns the exit code."""
    arguments, world = settings.arguments, settings.world
    if arguments.tensorboard:
        require_tensorboard()
    from dialogpt_ds.export.folder import MODEL_FOLDER, exported_step
    from dialogpt_ds.training.rank_checks import lock_output
    from dialogpt_ds.training.resume import preview_resume
    from dialogpt_ds.training.run import confirm_finished, train

    step = preview_resume(settings)
    if (
        step is not None
        and step >= arguments.num_optim_steps
        and exported_step(settings.output_dir / MODEL_FOLDER) == step
    ):
        if spans_hosts(world):
            confirm_finished(settings)
        if world.is_first:
            print(
                f"nothing to do: {settings.output_dir} is at step {step:,}, --num_optim_steps is "
                f"{arguments.num_optim_steps:,}"
            )
        return EXIT_DONE
    warnings = check_machine(settings, on_cpu_by_choice)
    prepare_cpu(world, offloads=settings.offload != ("none", "none"))
    if arguments.deterministic:
        compute_deterministically()
    if arguments.verbose:
        from deepspeed.utils.logging import set_log_level_from_string

        set_log_level_from_string("info")
    if not world.is_first:
        _say(warnings)
        return train(settings)
    make_folder(settings.output_dir, "--output_dir")
    make_folder(settings.log_dir, "--log_dir")
    with lock_output(settings.output_dir):
        _say(warnings)
        return train(settings)


def _say(warnings: list[str]) -> None:
    for warning in warnings:
        print(warning, file=sys.stderr)


def check_machine(settings: "Settings", on_cpu_by_choice: bool) -> list[str]:
    """Look at this machine as far as that takes milliseconds; returns warnings and notes.

    Raises:
        UserError: the run would fail here; all reasons at once.
    """
    from dialogpt_ds.model.memory import approximate_parameters, checkpoint_bytes

    world = settings.world
    rank = LaunchedRank(
        world.rank,
        world.size,
        world.local_rank,
        ranks_here(world),
        settings.deepspeed,
        settings.output_dir,
        on_cpu_by_choice,
        checkpoint_bytes(approximate_parameters(settings.model.config), settings.precision),
        settings.precision,
    )
    troubles = machine_troubles(rank)
    if problems := [str(trouble) for trouble in troubles if trouble.fatal]:
        raise UserError("\n".join(problems))
    notice = build_notice(settings.deepspeed, device_of_run() != "cpu") if world.local_rank == 0 else ""
    return [*(f"warning: {trouble}" for trouble in troubles), *([notice] if notice else [])]


def show(settings: "Settings") -> None:
    """Do what was asked for instead of training; rank 0 only."""
    arguments = settings.arguments
    if arguments.print_config:
        print_config(without_secrets(settings.what_runs()), without_secrets(settings.deepspeed))
    if arguments.plot_schedule:
        from dialogpt_ds.plots.curves import checked_picture
        from dialogpt_ds.plots.schedule import save_schedule

        output = checked_picture(arguments.plot_schedule, "--plot_schedule")
        highest, at = save_schedule(settings.schedule, output)
        print(
            f"schedule {arguments.lr_schedule}: peak rate {highest:.3e} at step {at:,} of "
            f"{arguments.num_optim_steps:,}, drawn in {output}"
        )
    if arguments.dry_run:
        from dialogpt_ds.training.dry_run import dry_run

        prepare_cpu(World(0, 1, 0), offloads=settings.offload != ("none", "none"))
        dry_run(settings)


def print_config(what_runs: dict[str, object], deepspeed: dict[str, object]) -> None:
    """Print the configuration that would run: arguments as YAML, then DeepSpeed's as JSON."""
    import yaml

    print("# run_config.yaml")
    print(yaml.safe_dump(what_runs, sort_keys=False, allow_unicode=True))
    print("# ds_config.json")
    print(json.dumps(deepspeed, indent=2))

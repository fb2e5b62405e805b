"""The command that makes the project's dashboard in wandb."""

import dataclasses
from pathlib import Path

from dialogpt_ds.commandline import parse, run_command
from dialogpt_ds.dashboard.panels import dashboard_text
from dialogpt_ds.dashboard.workspace import build_workspace, save_workspace, spec_json
from dialogpt_ds.errors import EXIT_DONE, UserError
from dialogpt_ds.files import replace_text

NOT_IN_NAMES = "/\\#?%:"
"""What wandb takes in no name of a project; in an address it would lead elsewhere."""


@dataclasses.dataclass
class DashboardArguments:
    """Options of the dashboard command."""

    entity: str = ""
    """wandb team or user that the project is in; not given: WANDB_ENTITY, else the key's own."""
    project: str = "dialogpt-ds"
    """wandb project whose runs the dashboard shows; training's --wandb_project."""
    name: str = "Dialogue training"
    """Title of the view."""
    show: bool = False
    """Print sections, panels and metrics with their units, and stop; needs no key, no network and no extra package."""
    save_json: str = ""
    """JSON file to write the view's specification to, and stop; needs no key and no network. An earlier file is
    replaced."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _dashboard(argv))


def _dashboard(argv: list[str] | None) -> int:
    description = (
        "Make a wandb view with the curves of all runs: training, throughput, stability, data, evaluation. "
        "Each call makes a new view beside earlier ones."
    )
    arguments = parse(DashboardArguments, description, argv).arguments
    _check_names(arguments)
    if arguments.show:
        print(dashboard_text())
    if arguments.save_json:
        text = spec_json(build_workspace(arguments.entity, arguments.project, arguments.name))
        print(f"Specification: {_written(arguments.save_json, text)}")
    if not (arguments.show or arguments.save_json):
        print(f"Dashboard: {save_workspace(arguments.entity, arguments.project, arguments.name)}")
    return EXIT_DONE


def _check_names(arguments: DashboardArguments) -> None:
    for option, value in (("--project", arguments.project), ("--entity", arguments.entity)):
        found = [character for character in NOT_IN_NAMES if character in value]
        if found:
            raise UserError(
                f"{option} {value!r}: wandb takes none of {' '.join(NOT_IN_NAMES)} in it; leave out {' '.join(found)}"
            )
    if not arguments.project.strip():
        raise UserError(f"--project {arguments.project!r}: a name is needed, that of training's --wandb_project")


def _written(path: str, text: str) -> Path:
    """Write a text file, and return where; raises UserError."""
    output = Path(path).expanduser()
    if output.is_dir():
        raise UserError(
            f"--save_json {path!r} is a folder, the name of a file is needed, e.g. {output / 'dashboard.json'}"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, text + "\n")
    except OSError as error:
        raise UserError(
            f"--save_json {path!r} cannot be written ({error.strerror or error}); choose another place"
        ) from error
    return output

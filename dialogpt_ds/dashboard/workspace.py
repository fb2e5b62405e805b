"""The dashboard as a workspace of wandb's own package, built without a key or a network, and saved to wandb's
server."""

import contextlib
import os
from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING, Any

from dialogpt_ds.dashboard.panels import CONFIG_COLUMNS, DASHBOARD, SUMMARY_COLUMNS, DashboardSection, Panel
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.logs.metrics import STEP
from dialogpt_ds.logs.wandb_mode import has_key, server
from dialogpt_ds.logs.wandb_service import WANDB_SECONDS, answers

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

STEP_TITLE = "optimizer step"


def require_workspaces() -> None:
    """Check that workspaces can be built.

    Raises:
        UserError: the package wandb-workspaces can't be imported.
    """
    try:
        import wandb_workspaces.reports.v2
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"dashboards are built by the package wandb-workspaces, which cannot be imported ({error}); "
            'install the extra that brings it: pip install "dialogpt-ds[dashboard]"'
        ) from error


def build_workspace(entity: str, project: str, name: str) -> "ws.Workspace":
    """Return the dashboard as a workspace; asks nobody.

    Args:
        entity: wandb team or user; only saving needs one.
        project: wandb project whose runs are shown.
        name: title of the view.

    Raises:
        UserError: wandb takes no such name, or the package wandb-workspaces is missing.
    """
    require_workspaces()
    import wandb_workspaces.workspaces as ws

    columns = [_config_column(path) for path in CONFIG_COLUMNS] + [f"summary:{name}" for name in SUMMARY_COLUMNS]
    sections = [_section(section) for section in DASHBOARD]
    try:
        return ws.Workspace(
            entity=entity, project=project, name=name, sections=sections,
            settings=ws.WorkspaceSettings(x_axis=STEP), runset_settings=ws.RunsetSettings(pinned_columns=columns),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(
            f"--name {name!r}: wandb takes no emoji and no symbols such as + = < > | ~ ^ $ in the title of a view; "
            "leave them out"
        ) from error


def spec_json(workspace: "ws.Workspace") -> str:
    """Return the workspace's specification as it would be sent, as JSON; the `__id__` of a panel is another one every
    time."""
    # The package has no public way to it; this is what its `save` does.
    return workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=1)


def require_key() -> None:
    """Check that there is a key; wandb would ask a person who may not be there.

    Raises:
        UserError: there is none.
    """
    if not has_key():
        raise UserError(
            f"no key for {server()}: run `wandb login` or set WANDB_API_KEY; "
            "without a key, --show prints the dashboard and --save_json FILE writes it to a file"
        )


def save_workspace(entity: str, project: str, name: str) -> str:
    """Save the dashboard as a new view on wandb's server and return its address.

    The first sign of the server is waited for WANDB_SECONDS, each answer to wandb's own calls 19 s (or
    WANDB_HTTP_TIMEOUT, in s).

    Raises:
        UserError: there is no key, or no entity and the key has none of its own, or wandb takes no such name.
        RunError: the server does not answer, or does not take it.
    """
    workspace = build_workspace(entity, project, name)
    require_key()
    if not answers(server()):
        raise RunError(
            f"{server()} does not answer within {WANDB_SECONDS:.0f} s; nothing was saved. Try again when it does"
        )
    with _failures_of_wandb(project):
        workspace.entity = entity or _own_entity()
        workspace.save()
        return workspace.url


def _own_entity() -> str:
    """Return the entity that a run would go to: WANDB_ENTITY, wandb's settings, or the key's default."""
    import wandb

    api = wandb.Api()
    entity = api.settings["entity"] or api.default_entity
    if not entity:
        raise UserError(
            f"--entity is needed: {server()} names no team or user for this key; give the one that the project is in"
        )
    return entity


@contextlib.contextmanager
def _failures_of_wandb(project: str) -> Iterator[None]:
    """Keep wandb quiet, and turn whatever it raises into a RunError."""
    # At exit it would wait for a server that hangs, to report on itself.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # wandb's own, and those of its transports
        raise RunError(
            f"the dashboard could not be saved on {server()}: {' '.join(str(error).split())}\n"
            f"Look whether that server works, whether it has the project {project!r} (a first training run makes it), "
            "and whether this key may write there; --entity names the project's team or user"
        ) from error


def _section(section: DashboardSection) -> "ws.Section":
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    panels: list[Any] = [_line_plot(panel) for panel in section.panels]
    if section.table:
        panels.append(wr.WeavePanelSummaryTable(table_name=section.table))
    # All panels on one page, so that none has to be looked for.
    layout = ws.SectionLayoutSettings(columns=section.columns, rows=ceil(len(panels) / section.columns))
    settings = ws.SectionPanelSettings(x_axis=STEP)
    return ws.Section(name=section.name, panels=panels, is_open=True, layout_settings=layout, panel_settings=settings)


def _line_plot(panel: Panel) -> "wr.LinePlot":
    import wandb_workspaces.reports.v2 as wr

    smooth = panel.smoothing > 0
    return wr.LinePlot(
        title=panel.title, x=STEP, y=list(panel.metrics), title_x=STEP_TITLE, title_y=panel.axis_title,
        log_y=panel.axis == "log" or None, metric_regex=panel.pattern or None,
        smoothing_type="exponentialTimeWeighted" if smooth else "none",
        smoothing_factor=panel.smoothing if smooth else None, smoothing_show_original=smooth or None,
    )  # fmt: skip


def _config_column(path: str) -> str:
    """Return wandb's name for a column: it keeps each key of the config in a `value`, e.g.
    `config:deepspeed.value.bf16.enabled`."""
    key, *rest = path.split(".")
    return "config:" + ".".join([key, "value", *rest])

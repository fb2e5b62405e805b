"""The dashboard: what is on it is what training logs, it is built without a network, and it comes to wandb's server."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.commandline import parse
from dialogpt_ds.commands.dashboard import main
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.dashboard.panels import (
    CONFIG_COLUMNS,
    DASHBOARD,
    REPLIES_TABLE,
    SUMMARY_COLUMNS,
    WITHOUT_PANEL,
    Panel,
    dashboard_text,
)
from dialogpt_ds.dashboard.workspace import build_workspace, spec_json
from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import EXIT_DONE, EXIT_RUN_FAILED, EXIT_USER_ERROR
from dialogpt_ds.logs import wandb_service
from dialogpt_ds.logs.metrics import METRICS, SECTIONS, SOURCE_EPOCHS, STEP, metric_of
from dialogpt_ds.model.flops import DevicePeak
from dialogpt_ds.training.report import run_facts
from dialogpt_ds.training.settings import prepare
from tests.conftest import ROOT
from tests.dashboard.view_server import serving
from tests.servers.wandb_server import ENTITY, KEY, hanging_port, refusing_port

COMMAND = ROOT / "launch" / "wandb_dashboard.py"
PANELS = [panel for section in DASHBOARD for panel in section.panels]
NAMED = {name for panel in PANELS for name in panel.metrics}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no netrc file and no settings of whoever runs the tests, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def run_file(*words: str, timeout: float = 60, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(COMMAND), *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=timeout)


def assert_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], *parts: str, code: int = EXIT_USER_ERROR
) -> None:
    assert main(words) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: " if code == EXIT_USER_ERROR else "run failed: ")
    assert printed.err.count("error: ") + printed.err.count("run failed: ") == 1
    for part in parts:
        assert part in printed.err


def without_ids(spec: Any) -> Any:
    """The specification but for the panels' ids, which are random."""
    if isinstance(spec, dict):
        return {key: without_ids(value) for key, value in spec.items() if key != "__id__"}
    return [without_ids(value) for value in spec] if isinstance(spec, list) else spec


def test_the_sections_are_those_of_the_metrics_in_their_order() -> None:
    assert [section.name for section in DASHBOARD] == list(SECTIONS)
    assert SECTIONS == ("Training", "Throughput", "Stability", "Data", "Evaluation")


def test_every_metric_on_the_dashboard_is_one_that_training_logs() -> None:
    assert {name for name in {*NAMED, *SUMMARY_COLUMNS, *WITHOUT_PANEL} if metric_of(name) is None} == set()


def test_every_metric_of_training_is_on_the_dashboard_or_left_out_on_purpose() -> None:
    assert METRICS.keys() - NAMED == WITHOUT_PANEL.keys()


def test_every_metric_is_in_its_own_section() -> None:
    for section in DASHBOARD:
        own = {name for name in NAMED if METRICS[name].section == section.name}
        assert own <= {name for panel in section.panels for name in panel.metrics}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_the_metrics_of_a_panel_share_the_unit_of_its_axis(panel: Panel) -> None:
    assert {METRICS[name].unit or "no unit" for name in panel.metrics} == {panel.unit}


def test_the_epochs_of_a_mixtures_sources_are_drawn_with_the_epoch() -> None:
    (panel,) = [panel for panel in PANELS if panel.pattern]
    names = [*METRICS, f"{SOURCE_EPOCHS}0", f"{SOURCE_EPOCHS}12"]
    assert [name for name in names if re.search(panel.pattern, name)] == [
        "epoch",
        f"{SOURCE_EPOCHS}0",
        f"{SOURCE_EPOCHS}12",
    ]


def test_the_columns_beside_the_runs_are_in_what_wandb_shows_as_their_configuration(
    small_world: tuple[Path, Path], tmp_path: Path
) -> None:
    model, shards = small_world
    words = ["--model", str(model), "--train_input_file", str(shards / "train"), "--skip_eval", "--fp16", "False"]
    settings = prepare(parse(TrainingArguments, "test", [*words, "--output_dir", str(tmp_path)]), World(0, 1, 0))
    facts = run_facts(settings, 1, DevicePeak(1.0, "test"))
    for path in CONFIG_COLUMNS:
        value: Any = facts
        for key in path.split("."):
            value = value[key]
        assert value is not None, path


def test_a_workspace_is_built_without_a_key_and_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    spec = json.loads(spec_json(build_workspace("", "dialogpt-ds", "Dialogue training")))
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    assert all(section["isOpen"] for section in sections)
    plots = {
        plot["config"]["chartTitle"]: plot["config"]
        for section in sections
        for plot in section["panels"]
        if is_plot(plot)
    }
    assert plots.keys() == {panel.title for panel in PANELS}
    for panel in PANELS:
        plot = plots[panel.title]
        assert (plot["xAxis"], plot["xAxisTitle"], plot["yAxisTitle"]) == (STEP, "optimizer step", panel.axis_title)
        assert plot["metrics"] == list(panel.metrics)
        assert plot.get("yLogScale", False) == (panel.axis == "log")
        assert plot.get("metricRegex", "") == panel.pattern
        assert plot.get("smoothingWeight", 0) == panel.smoothing
    assert json.dumps(sections[-1]["panels"][-1]).count(f'"{REPLIES_TABLE}"') == 1
    assert spec["section"]["settings"]["xAxis"] == STEP
    pinned = spec["section"]["runSets"][0]["runFeed"]["columnPinned"]
    assert {
        "config:learning_rate.value",
        "config:machine.value.processes",
        "summary:best_eval_ppl",
    } <= pinned.keys()


def is_plot(panel: dict[str, Any]) -> bool:
    return panel["viewType"] == "Run History Line Plot"


def test_show_prints_every_metric_with_its_unit_without_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_the_extra(monkeypatch)
    assert main(["--show"]) == EXIT_DONE
    printed = capsys.readouterr()
    assert printed.out == dashboard_text() + "\n"
    assert [line for line in printed.out.splitlines() if line in SECTIONS] == list(SECTIONS)
    for name in NAMED:
        assert f"    {name} [{METRICS[name].unit or 'no unit'}]: {METRICS[name].meaning}" in printed.out.splitlines()
    assert printed.err == ""


def without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb_workspaces", "wandb_workspaces.workspaces", "wandb_workspaces.reports.v2"):
        monkeypatch.setitem(sys.modules, name, None)


def test_the_file_writes_the_specification_where_no_server_is(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    file = tmp_path / "new" / "dashboard.json"
    with refusing_port() as port:
        done = run_file("--save_json", str(file), WANDB_BASE_URL=f"http://127.0.0.1:{port}")
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_DONE, f"Specification: {file}\n", "")
    expected = json.loads(spec_json(build_workspace("", "dialogpt-ds", "Dialogue training")))
    assert without_ids(json.loads(file.read_text(encoding="utf-8"))) == without_ids(expected)


@pytest.mark.parametrize(
    ("words", "environment", "entity"),
    [
        ([], {}, ENTITY),
        ([], {"WANDB_ENTITY": "a-team"}, "a-team"),
        (["--entity", "given"], {"WANDB_ENTITY": "a-team"}, "given"),
    ],
    ids=["the key's own", "WANDB_ENTITY", "--entity"],
)
def test_saving_sends_the_view_and_prints_its_address(
    tmp_path: Path, words: list[str], environment: dict[str, str], entity: str
) -> None:
    pytest.importorskip("wandb_workspaces")
    with serving() as server:
        done = run_file("--project", "talk", "--name", "Mine", *words, **server.environment, **environment)
    assert (done.returncode, done.stderr) == (EXIT_DONE, "")
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"], view["type"]) == (
        entity,
        "talk",
        "Mine",
        "project-view",
    )
    expected = json.loads(spec_json(build_workspace(entity, "talk", "Mine")))
    assert without_ids(json.loads(view["spec"])) == without_ids(expected)
    short = view["name"].removeprefix("nw-").removesuffix("-v")
    assert done.stdout == f"Dashboard: {server.environment['WANDB_BASE_URL']}/{entity}/talk?nw={short}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_refuses_the_view_is_quoted() -> None:
    pytest.importorskip("wandb_workspaces")
    with serving(refusal="permission denied, says the server") as server:
        done = run_file(**server.environment)
    assert (done.returncode, done.stdout) == (EXIT_RUN_FAILED, "")
    assert done.stderr.startswith(
        f"run failed: the dashboard could not be saved on {server.environment['WANDB_BASE_URL']}: "
    )
    assert "permission denied, says the server" in done.stderr
    assert "project 'dialogpt-ds'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_takes_the_question_and_says_nothing_ends_the_command_in_time() -> None:
    pytest.importorskip("wandb_workspaces")
    with serving(hangs=True) as server:
        started = time.monotonic()
        done = run_file(**server.environment, WANDB_HTTP_TIMEOUT="1")
        assert time.monotonic() - started < 30
    assert (done.returncode, done.stdout) == (EXIT_RUN_FAILED, "")
    assert "could not be saved" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("port_of", [refusing_port, hanging_port], ids=["refuses", "hangs"])
def test_a_server_that_is_not_there_is_said_before_wandb_waits_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, port_of: Any
) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setattr(wandb_service, "WANDB_SECONDS", 0.3)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with port_of() as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        assert_refused(
            capsys, [], f"http://127.0.0.1:{port} does not answer", "nothing was saved", code=EXIT_RUN_FAILED
        )


def test_a_key_without_an_entity_asks_for_one() -> None:
    pytest.importorskip("wandb_workspaces")
    with serving(entity=None) as server:
        done = run_file(**server.environment)
    assert (done.returncode, done.stdout, server.views) == (EXIT_USER_ERROR, "", [])
    assert done.stderr.startswith("error: --entity is needed: ")


def test_a_missing_key_is_an_error_with_three_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    assert_refused(capsys, [], "no key for https://", "wandb login", "WANDB_API_KEY", "--save_json")


@pytest.mark.parametrize("words", [[], ["--save_json", "dashboard.json"]])
def test_a_missing_extra_is_an_error_that_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    without_the_extra(monkeypatch)
    assert_refused(capsys, words, 'pip install "dialogpt-ds[dashboard]"')


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--project", "a/b"], ["--project 'a/b'", "leave out /"]),
        (["--entity", "https://wandb.ai/me"], ["--entity 'https://wandb.ai/me'", "leave out / :"]),
        (["--project", ""], ["--project ''", "--wandb_project"]),
        (["--name", "loss + ppl", "--save_json", "never.json"], ["--name 'loss + ppl'", "leave them out"]),
        (["--save_json", "."], ["--save_json '.'", "is a folder"]),
        (["--save_json", "/dev/null/x.json"], ["--save_json '/dev/null/x.json'", "choose another place"]),
        (["--entiti", "me"], ["--entiti", "--help"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_command_line_is_one_message(
    capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    assert_refused(capsys, words, *parts)

"""wandb with whole runs: everything arrives, nothing waits for it, no secret reaches it."""

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import psutil
import pytest
from wandb.sdk import wandb_setup

from dialogpt_ds.config.arguments import SAMPLE_PROMPTS
from dialogpt_ds.logs.text_logs import printable
from dialogpt_ds.logs.wandb_mode import choose_mode
from tests.conftest import ROOT
from tests.helpers.terminal import Terminal
from tests.ranks.launch import BIN, Launched, clean_environment, deepspeed, python
from tests.ranks.rank_tasks import write_deepspeed
from tests.servers import wandb_files
from tests.servers.file_server import FileServer
from tests.servers.wandb_server import KEY, WandbServer, client_environment, hanging_port, refusing_port

SmallWorld = tuple[Path, Path]
SECRET = "0123abcd4567efgh"
SIGNED = f"X-Signature={SECRET}"
ON = ("--wandb_mode", "online")


def options(world: SmallWorld, output: Path, steps: int, *more: str) -> list[str]:
    """Return a command line."""
    model, shards = world
    config = write_deepspeed(output.parent, 1, "fp32")
    return [
        "--model", str(model), "--train_input_file", str(shards / "train"), "--eval_input_file",
        str(shards / "validation"), "--num_optim_steps", str(steps), "--valid_step", "5", "--save_step", "5",
        "--lr_schedule", "None", "--learning_rate", "1e-3", "--sample_max_new_tokens", "4", "--deepspeed_config",
        config, "--output_dir", str(output), *more,
    ]  # fmt: skip


def logged(output: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def own(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of wandb without what it adds of its own, and without those of the tables."""
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows if "sample_replies" not in row]


def folder_of_run(output: Path) -> Path:
    """Return the folder of the only run."""
    (folder,) = (output / "wandb").glob("*run-*-*")
    return folder


def records_of(folder: Path) -> list[Any]:
    """Return the records of a run's folder."""
    return wandb_files.read_records(wandb_files.log_file(folder))


def test_an_offline_run_has_everything_and_no_secret(small_world: SmallWorld, tmp_path: Path) -> None:
    server = FileServer(small_world[1] / "train")
    output = tmp_path / "out"
    more = ["--train_input_file", f"{server.url}?{SIGNED}", "--cache_dir", str(tmp_path / "cache")]
    more += [
        "--wandb_mode",
        "offline",
        "--wandb_tags",
        "first",
        "second",
        "--wandb_group",
        "a group",
        "--wandb_job_type",
        "a job",
    ]
    more += [
        "--wandb_artifacts",
        "--wandb_run_name",
        "a name",
        "--wandb_project",
        "a-project",
        "--wandb_entity",
        "somebody",
    ]
    environment = {"SOME_API_KEY": "another-secret-98765"}
    try:
        with Launched(
            [*deepspeed(2), *options(small_world, output, 10, *more)], tmp_path / "log", environment
        ) as command:
            assert command.wait() == 0, command.output
            said = command.output
    finally:
        server.close()
    records = records_of(folder_of_run(output))
    assert own(wandb_files.history(records)) == logged(output), "the same dictionary as in metrics.jsonl, row by row"
    run = wandb_files.run_record(records)
    assert (run.project, run.entity, run.display_name, run.run_group, run.job_type) == (
        "a-project", "somebody", "a name", "a group", "a job",
    )  # fmt: skip
    assert sorted(run.tags) == ["first", "second"]
    check_config(wandb_files.config(records), small_world[1] / "train")
    assert wandb_files.metrics(records)["*"].step_metric == "step"
    table = json.loads(
        (folder_of_run(output) / "files" / wandb_files.tables(records)["sample_replies"]["path"]).read_text()
    )
    assert table["columns"] == ["step", "prompt", "reply"]
    lines = [f"step {step}: {printable(prompt)} -> {printable(reply)}" for step, prompt, reply in table["data"]]
    assert lines == (output / "sample_replies.txt").read_text().splitlines()[-len(SAMPLE_PROMPTS) :]
    check_artifacts(wandb_files.artifacts(records))
    assert wandb_files.exit_code(records) == 0
    assert f"wandb sync {output}/wandb/offline-run-*-{run.run_id}" in said
    check_no_secret(output, said)
    look_at(output / "wandb")


def look_at(folder: Path) -> None:
    """Open the run with the command that the README gives, in a real terminal."""
    with Terminal(
        [str(BIN / "wandb"), "leet", str(folder)], rows=50, columns=200, environment=clean_environment()
    ) as terminal:
        for text in ("Name: a name", "Metrics [1-9 of", "best_eval_loss", "[x: step]", "data_wait_share"):
            terminal.wait_for(text)
        assert SECRET not in terminal.all_text()
        terminal.send("q")
        assert terminal.wait() == 0


def check_artifacts(artifacts: list[Any]) -> None:
    """Check that the model and the table of evaluations were given."""
    of_type = {artifact.type: {entry.path for entry in artifact.manifest.contents} for artifact in artifacts}
    assert of_type["model"] >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert of_type["evaluation"] == {"evaluations.table.json"}


def check_config(config: dict[str, Any], shards: Path) -> None:
    """Check that the run's configuration says all that the run was."""
    assert config["num_optim_steps"] == 10
    assert config["deepspeed"]["zero_optimization"]["stage"] == 1
    assert config["precision"] == "fp32"
    assert re.fullmatch("[0-9a-f]{40}", config["revision"]["commit"])
    (data,) = config["train_data"]
    manifest, report = (json.loads((shards / name).read_text()) for name in ("manifest.json", "report.json"))
    assert data["manifest"] == {name: value for name, value in manifest.items() if name != "shardlist"}
    assert data["report"] == {name: value for name, value in report.items() if name != "histograms"}
    assert config["eval_data"]["manifest"]["totals"]["examples"] > 0
    assert config["machine"]["processes"] == 2


def check_no_secret(output: Path, said: str) -> None:
    """Look for the secret in every byte that the run wrote; the launcher's own lines show its whole command."""
    files = [path for path in output.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any("checkpoints" in path.parts and path.suffix == ".pt" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert [line for line in said.splitlines() if SECRET in line and "launch" not in line] == []
    assert "?(left out)" in (output / "run_config.yaml").read_text()


@pytest.mark.parametrize("outage", [refusing_port, hanging_port])
def test_a_server_that_is_down_at_the_start_costs_nothing_but_the_upload(
    small_world: SmallWorld, tmp_path: Path, outage: Any
) -> None:
    output = tmp_path / "out"
    with outage() as port:
        environment = client_environment(port)
        with Launched([*python(), *options(small_world, output, 20, *ON)], tmp_path / "log", environment) as command:
            assert command.wait() == 0, command.output
            said = command.output
    assert said.count("warning: wandb is offline in this run: http://127.0.0.1") == 1
    assert "Traceback" not in said
    rows = logged(output)
    assert sum("loss" in row for row in rows) == 20
    folder = folder_of_run(output)
    assert folder.name.startswith("offline-run-")
    assert own(wandb_files.history(records_of(folder))) == rows


@pytest.mark.parametrize("outage", [pytest.param("refuse", marks=pytest.mark.slow), "hang"])
def test_a_server_that_goes_down_in_mid_run_holds_up_nobody_and_gets_the_rest_later(
    small_world: SmallWorld, tmp_path: Path, outage: str
) -> None:
    output = tmp_path / "out"
    with WandbServer() as server:
        environment = server.environment() | {"WANDB_FINISH_TIMEOUT": "3"}
        # Two ranks: one that waited for wandb would let the other wait, too.
        with Launched(
            [*deepspeed(2), *options(small_world, output, 100, *ON)], tmp_path / "log", environment
        ) as command:
            command.wait_until(lambda: server.runs and (output / "metrics.jsonl").is_file() and len(logged(output)) > 5)
            getattr(server, outage)()
            assert command.wait() == 0, command.output
            said = command.output
        rows = logged(output)
        assert sum("loss" in row for row in rows) == 100
        assert "Traceback" not in said
        assert "did not take everything in 3 s; the rest, when it does: wandb sync" in said
        server.answer()
        (command_line,) = re.findall(r"the rest, when it does: (wandb sync .*)", said)
        environment = clean_environment() | server.environment()
        synced = subprocess.run(
            ["bash", "-c", command_line], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert synced.returncode == 0, synced.stdout + synced.stderr
        (run,) = server.runs.values()
        assert own(run.history) == rows, "nothing is lost, nothing is twice"
        assert run.exit_code == 0


def test_a_stop_does_not_wait_long_for_a_server_that_hangs(small_world: SmallWorld, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command_line = [
        *deepspeed(2),
        *options(small_world, output, 100_000, *ON, "--valid_step", "100000", "--save_step", "100000"),
    ]
    with WandbServer() as server, Launched(command_line, tmp_path / "log", server.environment()) as command:
        command.wait_until(lambda: server.runs and (output / "metrics.jsonl").is_file() and len(logged(output)) > 5)
        server.hang()
        command.ranks()[1].send_signal(signal.SIGUSR1)
        command.wait(timeout=60)
        said = command.output
    assert "stopped by SIGUSR1: step" in said
    assert "did not take everything in 10 s; the rest, when it does: wandb sync" in said
    assert (output / "checkpoints" / "latest").is_file()
    assert "Traceback" not in said
    rows = own(wandb_files.history(wandb_files.read_records(wandb_files.log_file(folder_of_run(output)), killed=True)))
    assert rows == logged(output), "on the disk before wandb's process was ended"


def test_a_resumed_run_is_the_same_run_and_no_step_of_it_is_dropped(small_world: SmallWorld, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with WandbServer() as server:
        for steps in (8, 12):  # the checkpoint is that of step 8, after the last step
            with Launched(
                [*python(), *options(small_world, output, steps, *ON, "--wandb_artifacts")],
                tmp_path / f"log{steps}",
                server.environment(),
            ) as command:
                assert command.wait() == 0, command.output
                assert f"wandb: {server.url}/" in command.output, "where to look"
        assert server.unknown == []
        (run,) = server.runs.values()
        assert [row["step"] for row in own(run.history) if "loss" in row] == list(range(1, 13))
        assert own(run.history) == logged(output)
        assert run.finished
        assert [artifact["committed"] for artifact in server.artifacts].count(True) >= 4, (
            "a model and a table from each start"
        )
        assert KEY not in "".join(path.read_text(errors="replace") for path in output.rglob("*.*") if path.is_file())


def test_what_a_killed_run_had_not_sent_comes_with_the_resume(small_world: SmallWorld, tmp_path: Path) -> None:
    """wandb sends every fifteen seconds or so, and a kill takes the rest with it."""
    output = tmp_path / "out"
    with WandbServer() as server:
        command_line = [
            *python(),
            *options(small_world, output, 100_000, *ON, "--save_step", "20", "--valid_step", "100000"),
        ]
        with Launched(command_line, tmp_path / "log", server.environment()) as command:
            command.wait_until(lambda: server.runs)
            server.hang()  # so that it surely has nothing of the history yet
            command.wait_until(lambda: (output / "checkpoints" / "step-00000020").is_dir() and len(logged(output)) > 30)
            command.process.kill()
            command.process.wait()
        server.answer()
        (run,) = server.runs.values()
        assert run.history == []
        resumed = [*python(), *options(small_world, output, 60, *ON, "--save_step", "20", "--valid_step", "100000")]
        with Launched(resumed, tmp_path / "log2", server.environment()) as command:
            assert command.wait() == 0, command.output
        assert list(server.runs.values()) == [run]
        assert own(run.history) == logged(output)


def rows_in_folders(output: Path) -> list[dict[str, Any]]:
    """Return the rows that wandb has on the disk, each once, of all its folders of a run, one of which may be at
    work."""
    found = {}
    for log in (output / "wandb").glob("offline-run-*/*.wandb"):
        if log.stat().st_size:
            for row in own(wandb_files.history(wandb_files.read_records(log, killed=True))):
                found[json.dumps(row, sort_keys=True)] = row
    return list(found.values())


@pytest.mark.parametrize(
    ("steps", "is_time"),
    [
        pytest.param(40, lambda output: True, id="at its start"),
        pytest.param(
            600, lambda output: len(rows_in_folders(output)) > 30, id="at work"
        ),  # which it writes every few seconds
        pytest.param(40, lambda output: len(logged(output)) >= 40, id="at its end"),
    ],
)
def test_wandbs_process_ended_by_a_launcher_costs_no_row(
    small_world: SmallWorld, tmp_path: Path, steps: int, is_time: Callable[[Path], bool]
) -> None:
    output = tmp_path / "out"
    more = ["--wandb_mode", "offline", "--valid_step", "100000", "--save_step", "100000"]

    def cores(command: Launched) -> list[psutil.Process]:
        found = []
        for process in command.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                found += [process] if "wandb-core" in process.name() else []
        return found

    with Launched([*python(), *options(small_world, output, steps, *more)], tmp_path / "log") as command:
        command.wait_until(lambda: cores(command) and is_time(output))
        (core,) = cores(command)
        core.terminate()
        assert command.wait() == 0, command.output
        said = command.output
    assert "wandb failed" not in said

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["step"], "seconds_save" in row, "eval_loss" not in row

    assert sorted(rows_in_folders(output), key=order) == sorted(logged(output), key=order)


def test_ctrl_c_ends_the_wait_for_a_server_that_hangs(small_world: SmallWorld, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with WandbServer() as server:
        environment = clean_environment() | server.environment()
        command = [*python(), *options(small_world, output, 30, *ON)]
        with Terminal(command, rows=60, columns=240, environment=environment, cwd=ROOT) as terminal:
            terminal.wait_for("/30 [", 60)
            while not server.runs:
                assert terminal.process.poll() is None, terminal.all_text()
            server.hang()
            terminal.wait_for("wandb is sending the rest, for 60 s or a little more (Ctrl-C leaves it for later)", 60)
            assert "done        30 steps" in terminal.all_text(), "said before the wait"
            terminal.send("\x03")
            assert terminal.wait(30) == 0, terminal.all_text()
            said = terminal.all_text()
    assert "not waiting for wandb any more" in said
    assert "did not take everything" in said
    assert "wandb sync --include-online" in said
    assert "Traceback" not in said


def test_the_mode_is_offline_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    host = urlparse(wandb_setup.singleton().settings.base_url).hostname
    assert choose_mode("online") == ("offline", f"no key for {host}: wandb login, or WANDB_API_KEY"), "the flag wins"
    assert choose_mode("auto") == ("disabled", "")
    monkeypatch.delenv("WANDB_MODE")
    assert choose_mode("auto")[0] == "offline"
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    assert choose_mode("auto") == ("online", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://elsewhere:8080")
    assert choose_mode("auto")[0] == "offline", "the key is another server's"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode("auto")[0] == "online"
    assert choose_mode("offline") == ("offline", "")


@pytest.fixture(autouse=True)
def _settings_of_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings and caches of whoever runs the tests."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    yield
    assert not (ROOT / "wandb").exists(), "wandb's files belong into output_dir"

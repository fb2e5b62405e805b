"""What a person sees: the start-up table, the bar, the summary; plain lines in a file; and nobody else's noise."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.terminal import Terminal
from tests.ranks.launch import TRAIN, clean_environment, deepspeed, python, run
from tests.ranks.rank_tasks import write_deepspeed

SmallWorld = tuple[Path, Path]
START = (
    "model",
    "train data",
    "evaluation",
    "batch",
    "epoch",
    "schedule",
    "precision",
    "attention",
    "DeepSpeed",
    "output",
    "wandb",
)
END = ("done", "time", "best", "model", "checkpoint", "logs", "curves")
OURS = re.compile(
    r"("
    + "|".join((*START, *END))
    + r") {2,}\S|step \d+/|evaluation at step \d+:|  \S.* -> |checkpoint \S+ \(|wandb: look at it with wandb leet"
)
LAUNCHER = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[(INFO|WARNING)\] \[(launch|runner)\.py")


def options(world: SmallWorld, output: Path, *more: str) -> list[str]:
    """Return a command line."""
    model, shards = world
    config = write_deepspeed(output.parent, 2, "fp32")
    return [
        "--model", str(model), "--train_input_file", str(shards / "train"), "--eval_input_file",
        str(shards / "validation"), "--num_optim_steps", "60", "--valid_step", "30", "--lr_schedule", "None",
        "--learning_rate", "1e-3", "--sample_max_new_tokens", "4", "--deepspeed_config", config, "--output_dir",
        str(output), *more,
    ]  # fmt: skip


def heads(text: str) -> list[str]:
    """Return what stands in front of the two spaces of each line that has them."""
    return [line.split("  ")[0] for line in text.splitlines() if "  " in line and not line.startswith(" ")]


def test_a_terminal_shows_the_table_a_live_bar_and_where_everything_is(small_world: SmallWorld, tmp_path: Path) -> None:
    command = [*deepspeed(2), *options(small_world, tmp_path / "out")]
    with Terminal(command, rows=60, columns=140, environment=clean_environment(), cwd=ROOT) as terminal:
        terminal.wait_for("/60 [", 60)
        terminal.wait_for("30/60 [", 60)
        middle = terminal.screen_text()
        assert terminal.wait(60) == 0, terminal.all_text()
        end = terminal.all_text()
    assert re.search(
        r"\d+%\|.{10}\| \d+/60 \[\d\d:\d\d, .*loss \d\.\d{4}  ppl [\d.,]+  \d\d:\d\d left  [\d,]+ tok/s", middle
    )
    assert len(re.findall(r"/60 \[", end)) == 1, "one bar, redrawn in its place"
    found = heads(end)
    assert [head for head in found if head in START][: len(START)] == list(START)
    assert found[-len(END) :] == list(END)
    assert f"logs        {tmp_path / 'out'} (train_log.txt, metrics.jsonl, sample_replies.txt)" in end


def test_a_narrow_terminal_keeps_the_bar_on_one_line(small_world: SmallWorld, tmp_path: Path) -> None:
    command = [*python(), *options(small_world, tmp_path / "out")]
    with Terminal(command, rows=100, columns=60, environment=clean_environment(), cwd=ROOT) as terminal:
        assert terminal.wait(60) == 0, terminal.all_text()
        lines = terminal.all_text().splitlines()
    assert len([line for line in lines if "/60 [" in line]) == 1
    assert any(line.startswith("100%|") and "loss" in line for line in lines)


def test_under_nohup_there_are_plain_lines_in_a_file(small_world: SmallWorld, tmp_path: Path) -> None:
    words = [*python(), *options(small_world, tmp_path / "out")]
    with Terminal(["nohup", *words], environment=clean_environment(), cwd=tmp_path) as terminal:
        assert terminal.wait(60) == 0, terminal.all_text()
        shown = terminal.screen_text()
    assert "nohup.out" in shown
    text = (tmp_path / "nohup.out").read_bytes()
    assert b"\r" not in text
    assert b"\x1b" not in text
    lines = text.decode().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/60", "60/60"]
    assert heads(text.decode())[-len(END) :] == list(END)


@pytest.mark.parametrize("stage", [1, 3])
def test_nothing_else_is_said(small_world: SmallWorld, tmp_path: Path, stage: int) -> None:
    config = write_deepspeed(tmp_path, stage, "fp32")
    result = run([*deepspeed(2), *options(small_world, tmp_path / "out"), "--deepspeed_config", config])
    assert result.returncode == 0, result.stderr
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    assert [line for line in lines if not (OURS.match(line) or LAUNCHER.match(line))] == []


def test_verbose_brings_back_what_the_libraries_say(small_world: SmallWorld, tmp_path: Path) -> None:
    result = run(
        [*deepspeed(2), *options(small_world, tmp_path / "out", "--verbose", "--num_optim_steps", "2", "--skip_eval")]
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "DeepSpeed Final Optimizer" in said
    assert "FutureWarning" in said
    assert re.search(r"^\[rank 1\] ", said, re.MULTILINE), "the other ranks' lines begin with their rank"


def test_a_terminal_that_knows_no_unicode_loses_nothing_but_characters(small_world: SmallWorld, tmp_path: Path) -> None:
    words = [*python(), *options(small_world, tmp_path / "ö", "--sample_prompts", "naïve?", "--num_optim_steps", "2")]
    result = subprocess.run(
        words,
        env=clean_environment() | {"PYTHONIOENCODING": "ascii"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 0, result.stderr
    assert "na\\xefve? ->" in result.stdout
    assert "done        2 steps" in result.stdout
    assert "left out" not in result.stderr


def test_a_terminal_that_is_closed_does_not_end_the_run(small_world: SmallWorld, tmp_path: Path) -> None:
    """As with `train.py | head`: nobody reads any more, and the run goes on to its end."""
    output = tmp_path / "out"
    reader, writer = os.pipe()
    with subprocess.Popen(
        [*python(TRAIN), *options(small_world, output)], stdout=writer, stderr=writer, env=clean_environment(), cwd=ROOT
    ) as process:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        assert process.wait(timeout=90) == 0
    assert (output / "model" / "model.safetensors").is_file()
    assert len((output / "train_log.txt").read_text().splitlines()) == 61

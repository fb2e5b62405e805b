"""The plot command: what it draws, what its table says, and how it refuses."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from dialogpt_ds.commands.plot import main
from dialogpt_ds.errors import EXIT_DONE, EXIT_USER_ERROR
from dialogpt_ds.plots.curves import running_mean
from dialogpt_ds.plots.runs import read_runs, seconds_by_part

matplotlib_image = pytest.importorskip("matplotlib.image")
PLOT = Path(__file__).resolve().parents[2] / "launch" / "plot.py"
AXIS_LABELS = (
    "loss (nats per target token)",
    "perplexity (log scale)",
    "learning rate",
    "real tokens per second",
    "optimizer step",
    "share of the training time (%)",
)


def write_run(folder: Path, rows: list[dict], end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + end, encoding="utf-8")
    return folder


def training_rows(num_steps: int, seconds: dict[str, float] | None = None) -> list[dict]:
    rows = []
    for step in range(1, num_steps + 1):
        loss = 4 + 6 / step
        row = {"step": step, "loss": loss, "ppl": math.exp(loss), "lr": 1e-4 / step, "tokens_per_second": 1000.0 + step}
        rows.append(row | (seconds or {}))
    return rows


def colours(picture: Path) -> np.ndarray:
    pixels = matplotlib_image.imread(picture)[..., :3]
    return np.unique(pixels.reshape(-1, 3), axis=0)


def table(text: str) -> dict[str, list[str]]:
    """The cells of each run, by its name."""
    lines = [line.split() for line in text.split("\n\n")[0].splitlines()[1:]]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.mark.parametrize("num_steps", [1, 12, 120])
def test_a_png_shows_every_run_in_its_own_colour(tmp_path, num_steps):
    runs = [str(write_run(tmp_path / name, training_rows(num_steps))) for name in ("first", "second")]
    output = tmp_path / "new folder" / "curves.png"
    assert main([*runs, "--output", str(output)]) == EXIT_DONE
    assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    found = {tuple(np.round(colour * 255).astype(int)) for colour in colours(output)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= found


def test_an_svg_has_its_labels_and_names_as_text_and_the_same_bytes_every_time(tmp_path):
    seconds = {"seconds_per_step": 1.0, "seconds_forward": 0.25, "seconds_backward": 0.5}
    run = write_run(tmp_path / "_a $x$ run", [*training_rows(60, seconds), {"step": 60, "eval_loss": 4.2}])
    for name in ("one.svg", "two.SVG"):
        assert main([str(run), "-o", str(tmp_path / name)]) == EXIT_DONE
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    for label in (*AXIS_LABELS, "_a $x$ run", "line: training, running mean", "forward", "backward", "other"):
        assert f">{label}<" in text
    assert ">optimizer<" not in text, "a part that was not logged is not in the legend"
    assert (tmp_path / "two.SVG").read_text(encoding="utf-8") == text


def test_panels_without_data_say_so(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 5, "eval_loss": 3.0, "eval_ppl": 20.1}, {"step": 9, "eval_loss": 2.9}])
    assert main([str(run), "--output", str(tmp_path / "curves.svg")]) == EXIT_DONE
    assert (tmp_path / "curves.svg").read_text(encoding="utf-8").count(">not logged<") == 3


def test_the_table_compares_the_runs(tmp_path, capsys):
    rows = training_rows(4, {"seconds_per_step": 900.0, "seconds_data": 9.0})
    rows[1] |= {"eval_loss": 3.0, "eval_ppl": 20.0, "mfu": 0.502}
    rows += [{"step": 3, "eval_loss": 2.5, "eval_ppl": 12.5}, {"step": 4, "eval_loss": 2.7, "eval_ppl": 15.0}]
    full = write_run(tmp_path / "full", rows)
    bare = write_run(tmp_path / "bare", [{"step": 10, "loss": 5.0}, {"step": 20, "loss": float("nan")}])
    assert main([str(full), str(bare / "metrics.jsonl"), "--output", str(tmp_path / "curves.png")]) == EXIT_DONE
    printed = capsys.readouterr()
    header = " ".join(printed.out.splitlines()[0].split())
    assert header == "run steps last loss best eval ppl at step last eval ppl median tokens/s median MFU hours"
    assert table(printed.out) == {
        "full": ["4", "5.5000", "12.50", "3", "15.00", "1002", "50.2%", "1.000"],
        "bare": ["20", "nan", "-", "-", "-", "-", "-", "-"],
    }
    assert str(tmp_path / "curves.png") in printed.out
    assert printed.err == ""


def test_runs_of_one_folder_name_are_told_apart_by_their_parents(tmp_path, capsys):
    runs = [str(write_run(tmp_path / parent / "output", training_rows(2))) for parent in ("a", "b")]
    assert main([*runs, "--output", str(tmp_path / "curves.png")]) == EXIT_DONE
    assert set(table(capsys.readouterr().out)) == {"a/output", "b/output"}


def test_a_step_that_was_logged_again_counts_once_with_its_last_value(tmp_path):
    run = write_run(tmp_path / "run", [{"step": s, "loss": value} for s, value in ((1, 9), (2, 8), (3, 7), (2, 6))])
    loss = read_runs([str(run)])[0].series["loss"]
    assert (loss.steps.tolist(), loss.values.tolist()) == ([1, 2, 3], [9, 6, 7])


@pytest.mark.parametrize("first_step", [1, 1001])
def test_time_is_split_by_hand(tmp_path, first_step):
    part = {"seconds_forward": 2.0, "seconds_backward": 5.0}
    rows = [{"step": first_step + n, "seconds_per_step": 10.0, **part} for n in range(3)]
    rows[2] |= {"seconds_evaluation": 30.0}  # not in seconds_per_step here: it must not eat the others' rest
    seconds = seconds_by_part(read_runs([str(write_run(tmp_path / "run", rows))])[0])
    assert seconds == {"forward": 6.0, "backward": 15.0, "evaluation": 30.0, "other": 3.0 + 3.0}


def test_time_of_steps_between_the_logged_ones_counts(tmp_path):
    rows = [{"step": step, "seconds_per_step": 2.0} for step in (10, 20, 25)]
    assert seconds_by_part(read_runs([str(write_run(tmp_path / "run", rows))])[0]) == {"other": 50.0}


def test_the_running_mean_is_centred_and_leaves_out_what_is_not_a_number():
    assert running_mean(np.arange(60.0)).tolist() == pytest.approx(np.arange(60.0).tolist())
    values = np.array([1.0, 2.0, np.nan, 4.0, 6.0, np.inf, 0.0])
    assert running_mean(values)[:5].tolist() == pytest.approx([1, 1.5, 13 / 4, 12 / 3, 10 / 3])


@pytest.mark.parametrize("end", ['{"step": 4, "lo', '{"step": 4, "name": "\udcc3', "\0\0\0\n"])
def test_a_last_line_that_a_crash_cut_short_is_left_out_and_said(tmp_path, capsys, end):
    run = write_run(tmp_path / "run", training_rows(3))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(end.encode("utf-8", "surrogateescape"))
    assert main([str(run), "--output", str(tmp_path / "curves.png")]) == EXIT_DONE
    printed = capsys.readouterr()
    assert table(printed.out)["run"][0] == "3"
    assert f"note: {run / 'metrics.jsonl'}:4: " in printed.err


@pytest.mark.parametrize(
    "broken", ['{"step": 2, "lo', "[1]", '{"loss": 1.0}', '{"step": 1.5}', '{"step": NaN}', "\udcff"]
)
def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path, capsys, broken):
    place = tmp_path / "metrics.jsonl"
    place.write_bytes(b'{"step": 1}\n\n' + broken.encode("utf-8", "surrogateescape") + b'\n{"step": 3}\n')
    assert_refused(capsys, [str(place), "--output", str(tmp_path / "curves.png")], f"{place}:3: not ")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("content", ["", "\n \n", '{"step": 1, "lo'])
def test_a_file_without_a_step_is_an_error(tmp_path, capsys, content):
    run = write_run(tmp_path / "run", [], end=content)
    assert_refused(capsys, [str(run)], str(run / "metrics.jsonl"), "no step is logged")


def test_a_run_without_metrics_is_an_error_that_says_where_it_looked(tmp_path, capsys):
    assert_refused(capsys, [str(tmp_path)], "no metrics.jsonl", str(tmp_path / "metrics.jsonl"), "output_dir")
    missing = tmp_path / "missing"
    assert_refused(capsys, [str(missing)], "no metrics.jsonl", f"{missing}, which does not exist")


def test_one_run_given_twice_is_an_error(tmp_path, capsys):
    run = write_run(tmp_path / "run", training_rows(2))
    assert_refused(capsys, [str(run), str(run / "metrics.jsonl")], "more than once")


@pytest.mark.parametrize("name", ["curves.pdf", "curves", ".png"])
def test_another_kind_of_picture_is_refused_with_the_kinds_there_are(tmp_path, capsys, name):
    run = write_run(tmp_path / "run", training_rows(2))
    assert_refused(capsys, [str(run), "--output", str(tmp_path / name)], name, ".png or .svg")


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path, capsys):
    run = write_run(tmp_path / "run", training_rows(2))
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    assert_refused(capsys, [str(run), "--output", str(tmp_path / "file" / "curves.png")], "cannot be written")
    assert_refused(capsys, [str(run), "--output", str(tmp_path / "folder.png")], "is a folder")


def test_a_missing_matplotlib_is_an_error_that_names_the_extra(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", training_rows(2))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_refused(capsys, [str(run)], "pip install dialogpt-ds[demo]")


def test_a_command_line_without_runs_is_an_error(capsys):
    assert_refused(capsys, ["--output", "curves.png"], "runs")


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_file_runs_from_another_folder(tmp_path, is_installed):
    run = write_run(tmp_path / "run", training_rows(5))
    words = ["run", "--output", "curves.png"]
    command = [sys.executable, str(PLOT), *words]
    if not is_installed:
        # Without `site`, no .pth file leads to an editable install; the dependencies are still there.
        program = "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
        program += f"runpy.run_path({str(PLOT)!r}, run_name='__main__')"
        command = [sys.executable, "-S", "-c", program, sysconfig.get_paths()["purelib"], *words]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=run.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_DONE, done.stderr
    assert table(done.stdout)["run"][0] == "5"
    assert len(colours(tmp_path / "curves.png")) > 2


def assert_refused(capsys: pytest.CaptureFixture, words: list[str], *parts: str) -> None:
    assert main(words) == EXIT_USER_ERROR
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    for part in parts:
        assert part in printed.err

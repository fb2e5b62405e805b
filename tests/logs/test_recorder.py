"""One record goes everywhere; a place that fails is said once and left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.logs import metrics
from dialogpt_ds.logs.record import LogRecord, Reply
from dialogpt_ds.logs.recorder import Recorder
from tests.conftest import ROOT


def recorder_in(folder: Path, first_step: int = 0) -> Recorder:
    """Return the recorder of a run of 100 steps without wandb."""
    return Recorder(TrainingArguments(num_optim_steps=100, wandb_mode="disabled"), folder, folder, first_step)


def step(number: int, **more: Any) -> LogRecord:
    """Return the record of a step."""
    values = {"step": number, "loss": 2.0, "ppl": 7.389, "tokens_per_second": 1.0, "lr": 1e-3, "seconds_left": 1.0}
    return LogRecord("step", values | more, [1, number, number, 2.0, 7.389, 1, 1, 1.0])


class Broken:
    """A sink on a disk that is gone."""

    name = "the broken one"
    taken = 0

    def take(self, record: LogRecord) -> None:
        """Fail."""
        self.taken += 1
        raise OSError("no such disk")

    def close(self) -> None:
        """Nothing to do."""


def test_a_sink_that_fails_is_reported_once_and_the_others_get_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = recorder_in(tmp_path)
    broken = Broken()
    recorder.sinks.insert(0, broken)
    for number in (1, 2, 3):
        recorder.record(step(number))
    recorder.close_files()
    err = capsys.readouterr().err
    assert err.count("warning: the broken one failed and is left out from here on: OSError('no such disk')") == 1
    assert broken.taken == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_terminal_that_is_gone_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorder_in(tmp_path)

    def gone(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", gone)
    recorder.record(step(1))
    recorder.say("more")
    recorder.record(step(2))
    recorder.close_files()
    assert len((tmp_path / "train_log.txt").read_text().splitlines()) == 3


def test_replies_are_lines_of_a_text_file_and_cut_back_on_a_resume(tmp_path: Path) -> None:
    first = recorder_in(tmp_path)
    for number in (5, 10):
        values = {"step": number, "eval_loss": 1.0}
        first.record(
            LogRecord(
                "evaluation",
                values,
                [1, number, 1, 1.0, 2.7],
                replies=[Reply("How are you?", f"a\nb\x1b[31m {number}")],
            )
        )
    first.close_files()
    file = tmp_path / "sample_replies.txt"
    assert file.read_text().splitlines() == [
        "step 5: How are you? -> a\\nb\\x1b[31m 5",
        "step 10: How are you? -> a\\nb\\x1b[31m 10",
    ]
    recorder_in(tmp_path, 7).close_files()
    assert file.read_text().splitlines() == ["step 5: How are you? -> a\\nb\\x1b[31m 5"]


def test_a_metric_without_a_meaning_is_a_mistake_in_the_program() -> None:
    assert metrics.checked_row({"step": 1, "loss": 2.0, "gpu_memory_gib": None, "epoch_source_3": 0.5}) == {
        "step": 1,
        "loss": 2.0,
        "epoch_source_3": 0.5,
    }
    with pytest.raises(AssertionError, match="los"):
        metrics.checked_row({"step": 1, "los": 2.0})


def test_every_metric_has_a_section_and_says_something() -> None:
    for name, metric in metrics.METRICS.items():
        assert metric.section in metrics.SECTIONS, name
        assert metric.meaning, name


def test_the_readme_says_what_every_metric_is() -> None:
    readme = (ROOT / "dialogpt_ds" / "logs" / "README.md").read_text(encoding="utf-8")
    assert [name for name in metrics.METRICS if f"`{name}`" not in readme] == []

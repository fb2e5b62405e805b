"""Subtitles become conversations that pauses divide."""

import json
from pathlib import Path

import pytest

from dialogpt_ds.commands.make_shards import main
from dialogpt_ds.conversations.inputs import open_inputs

SRT = """1
00:00:01,000 --> 00:00:02,500
How are
<i>you?</i>

2
00:00:03,000 --> 00:00:04,000
Fine.

3
00:01:00,000 --> 00:01:01,000
Who is it?

4
00:01:02,000 --> 00:01:03,000
Me.
"""


@pytest.mark.parametrize("format_name", ["auto", "srt"])
def test_subtitles(tmp_path: Path, format_name: str) -> None:
    file = tmp_path / "film.srt"
    file.write_text(SRT)
    (source,) = open_inputs([str(file)], format_name, "auto")
    assert source.describe().endswith("film.srt: subtitles")
    records = list(source.records())
    assert [record.line for record in records] == [2, 11]
    assert [[turn.text for turn in source.read(record).turns] for record in records] == [
        ["How are you?", "Fine."],
        ["Who is it?", "Me."],
    ]
    assert main(["--format", format_name, "--input", str(file), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["conversations"], report["configuration"]["inputs"][0]["format"]) == (2, "srt")


def test_help_and_errors_know_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "srt (subtitles)" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "a.txt").write_text("no format\n")
    assert main(["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]) == 2
    assert "no subtitle times, no tab as in source<TAB>target, and no NAME: text" in capsys.readouterr().err

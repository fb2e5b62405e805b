"""The logs: DialoGPT's headers, full precision, and cut back to the checkpoint on a resume."""

import json
from pathlib import Path

from dialogpt_ds.logs.text_logs import EVAL_HEADER, TRAIN_HEADER, TextLogs


def test_lines_are_in_the_file_at_once_with_full_precision(tmp_path: Path) -> None:
    logs = TextLogs(tmp_path, resumed_step=0)
    logs.train_line([1, 1, 2, 0.1 + 0.2, 1.5, 10, 20, 0.25])
    assert (tmp_path / "train_log.txt").read_text() == f"{TRAIN_HEADER}\n1,1,2,0.30000000000000004,1.5,10,20,0.25\n"
    assert (tmp_path / "eval_log.txt").read_text() == f"{EVAL_HEADER}\n"
    assert TRAIN_HEADER == "epoch,global_step,step,mean_loss,mean_ppl,n_token_real,n_token_total,epoch_time"
    assert EVAL_HEADER == "epoch,global_step,step,eval_loss,eval_ppl"


def test_a_resume_cuts_back_what_came_after_the_checkpoint_and_torn_lines(tmp_path: Path) -> None:
    logs = TextLogs(tmp_path, resumed_step=0)
    for step in range(1, 6):
        logs.train_line([1, step, step, 1.0, 2.0, 1, 1, 1.0])
        logs.metrics_line({"step": step, "loss": float("nan")})
    logs.eval_line([1, 4, 4, 1.0, 2.0])
    logs.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    resumed = TextLogs(tmp_path, resumed_step=3)
    resumed.metrics_line({"step": 4})
    assert [line.split(",")[1] for line in (tmp_path / "train_log.txt").read_text().splitlines()] == [
        "global_step",
        "1",
        "2",
        "3",
    ]
    assert (tmp_path / "eval_log.txt").read_text() == f"{EVAL_HEADER}\n"
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert metrics[0]["loss"] is None, "JSON has no NaN"


def test_a_run_from_scratch_starts_new_logs(tmp_path: Path) -> None:
    (tmp_path / "train_log.txt").write_text("old\n")
    TextLogs(tmp_path, resumed_step=0).close()
    assert (tmp_path / "train_log.txt").read_text() == f"{TRAIN_HEADER}\n"


def test_a_torn_line_is_dropped_even_where_its_step_looks_small(tmp_path: Path) -> None:
    (tmp_path / "train_log.txt").write_text(f"{TRAIN_HEADER}\n1,2,2,1.0,2.0,1,1,1.0\n1,25")  # was 1,250,...
    TextLogs(tmp_path, resumed_step=200).close()
    assert (tmp_path / "train_log.txt").read_text() == f"{TRAIN_HEADER}\n1,2,2,1.0,2.0,1,1,1.0\n"

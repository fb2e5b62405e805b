"""TensorBoard's files, read back with TensorBoard's own reader."""

from pathlib import Path

import pytest

from dialogpt_ds.errors import UserError
from dialogpt_ds.logs.record import LogRecord, Reply
from dialogpt_ds.logs.tensorboard import TENSORBOARD_FOLDER, TensorBoard, require_tensorboard


def test_what_is_written_comes_back_and_a_resume_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        first.take(LogRecord("step", {"step": step, "loss": 10.0 - step, "grad_norm": float("nan"), "lr": 1e-3}))
    first.take(LogRecord("evaluation", {"step": 2, "eval_loss": 5.0}, replies=[Reply("a | b", "c\nd")]))
    first.close()
    second = TensorBoard(tmp_path, 2)
    second.take(LogRecord("step", {"step": 3, "loss": 1.0}))
    second.close()
    found = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("Training/loss")] == [(1, 9.0), (2, 8.0), (3, 1.0)]
    assert found.Tags()["scalars"] == ["Training/loss", "Training/lr", "Evaluation/eval_loss"]
    assert b"| a \\| b | c d |" in found.Tensors("Evaluation/replies/text_summary")[0].tensor_proto.string_val[0]


def test_without_the_package_the_option_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r'pip install "dialogpt-ds\[tensorboard\]"'):
        require_tensorboard()

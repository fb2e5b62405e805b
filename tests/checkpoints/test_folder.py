"""The folder of checkpoints on the disk: complete or absent, whatever an earlier process was killed in the middle
of."""

import re
from pathlib import Path

import pytest

from dialogpt_ds.checkpoints.folder import CheckpointFolder, DamagedCheckpointError, Summary, difference, sums_of


def write_checkpoint(folder: CheckpointFolder, step: int, content: bytes = b"weights") -> Path:
    """Write a checkpoint with one small file, as a finished save leaves it."""
    unfinished = folder.unfinished(f"step-{step:08d}")
    unfinished.mkdir(parents=True)
    (unfinished / "weights.pt").write_bytes(content)
    files = {"weights.pt": sums_of(unfinished / "weights.pt")}
    Summary(step, 1, 1, "bf16", {}, "tiny", {}, {}, files=files).write(unfinished)
    folder.publish(unfinished, f"step-{step:08d}")
    folder.point("latest", step)
    return folder.path(step)


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.root.iterdir() if path.is_dir())


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path)


def test_the_newest_and_the_best_are_kept(folder: CheckpointFolder) -> None:
    for step in range(1, 7):
        write_checkpoint(folder, step)
    folder.point("best", 2)
    folder.rotate(keep=0)
    assert folder.steps() == [1, 2, 3, 4, 5, 6], "0 keeps all"
    folder.rotate(keep=2)
    assert folder.steps() == [2, 5, 6]


def test_a_conversion_goes_when_a_newer_checkpoint_is_complete(folder: CheckpointFolder) -> None:
    write_checkpoint(folder, 1)
    (folder.root / "universal-step-00000001").mkdir()
    folder.rotate(keep=3)
    assert names(folder) == ["step-00000001", "universal-step-00000001"]
    write_checkpoint(folder, 2)
    folder.rotate(keep=3)
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_what_a_kill_has_left_is_cleaned_up(folder: CheckpointFolder) -> None:
    write_checkpoint(folder, 1)
    write_checkpoint(folder, 2)
    for remains in (
        "unfinished-step-00000003",
        "unfinished-deleted-step-00000000",
        "unfinished-universal-step-00000002",
    ):
        (folder.root / remains).mkdir()
        (folder.root / remains / "half").write_bytes(b"x")
    folder.clean()
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_a_kill_between_the_rename_and_the_pointer(folder: CheckpointFolder) -> None:
    write_checkpoint(folder, 1)
    write_checkpoint(folder, 2)
    folder.point("latest", 1)
    folder.clean()
    assert folder.pointer("latest") == 2


@pytest.mark.parametrize("new_is_there", [False, True])
def test_a_kill_while_a_checkpoint_is_replaced_by_one_of_its_step(folder: CheckpointFolder, new_is_there: bool) -> None:
    path = write_checkpoint(folder, 1, b"old")
    path.rename(folder.root / "replaced-step-00000001")
    if new_is_there:
        write_checkpoint(folder, 1, b"new")
    folder.clean()
    assert names(folder) == ["step-00000001"]
    assert (path / "weights.pt").read_bytes() == (b"new" if new_is_there else b"old")


def test_replacing_a_checkpoint_of_the_same_step(folder: CheckpointFolder) -> None:
    write_checkpoint(folder, 1, b"old")
    path = write_checkpoint(folder, 1, b"new")
    assert (path / "weights.pt").read_bytes() == b"new"
    assert names(folder) == ["step-00000001"]


def test_what_is_left_behind_is_another_history(folder: CheckpointFolder) -> None:
    for step in (1, 2, 3):
        write_checkpoint(folder, step)
    folder.point("best", 3)
    assert folder.leave_behind(1) == ["left-step-00000002", "left-step-00000003"]
    assert folder.steps() == [1]
    assert (folder.pointer("latest"), folder.pointer("best")) == (1, None)
    write_checkpoint(folder, 2)
    assert folder.leave_behind(1) == ["left-step-00000002-2"], "nothing is overwritten"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"weightz", "weights.pt has SHA-256 .*, .* was written"),
        (b"weight", "weights.pt has 6 bytes, 7 were written"),
        (None, "weights.pt: No such file"),
    ],
)
def test_damage_is_found(folder: CheckpointFolder, content: bytes | None, message: str) -> None:
    path = write_checkpoint(folder, 1)
    summary = Summary.read(path)
    assert difference(path, "weights.pt", summary.files["weights.pt"]) is None
    (path / "weights.pt").unlink() if content is None else (path / "weights.pt").write_bytes(content)
    found = difference(path, "weights.pt", summary.files["weights.pt"])
    assert found is not None
    assert re.match(message, found)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"step": 1}', '{"format": 1, "files": {}, "unknown": 1}'])
def test_a_damaged_summary(folder: CheckpointFolder, text: str | None) -> None:
    path = write_checkpoint(folder, 1) / "checkpoint.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint\.json"):
        Summary.read(path.parent)


def test_a_changed_digit_in_the_summary(folder: CheckpointFolder) -> None:
    path = write_checkpoint(folder, 1) / "checkpoint.json"
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(DamagedCheckpointError, match="is not as it was written"):
        Summary.read(path.parent)


def test_a_summary_of_another_format_is_not_guessed_at(folder: CheckpointFolder) -> None:
    path = write_checkpoint(folder, 1) / "checkpoint.json"
    Summary(**vars(Summary.read(path.parent)) | {"format": 2}).write(path.parent)
    with pytest.raises(DamagedCheckpointError, match="has format 2, this version reads 1"):
        Summary.read(path.parent)

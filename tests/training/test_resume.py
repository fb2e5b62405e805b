"""What a run is resumed from: what fits, what doesn't and which option accepts it, and what is damaged."""

import json
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from dialogpt_ds.checkpoints.folder import CheckpointFolder, Summary, sums_of
from dialogpt_ds.commandline import parse
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import UserError
from dialogpt_ds.order.mixture import MixturePosition, order_state
from dialogpt_ds.order.position import Position
from dialogpt_ds.training import rank_checks
from dialogpt_ds.training.rank_checks import lock_output
from dialogpt_ds.training.resume import check_fits, choose_checkpoint, position_to_resume_from, preview_resume
from dialogpt_ds.training.settings import Settings, prepare
from tests.helpers.append_only import append_only
from tests.ranks.data_tasks import renames_error, shared_disk_error
from tests.ranks.launch import python, run
from tests.ranks.rank_pool import RankPool
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import whole_run

SmallWorld = tuple[Path, Path]
CPU = torch.device("cpu")


def settings_of(
    small_world: SmallWorld, folder: Path, *more: str, world: int = 1, stage: int = 1, **json_keys: object
) -> Settings:
    model, shards = small_world
    (folder / "json").mkdir(exist_ok=True)
    argv = ["--model", str(model), "--train_input_file", str(shards / "train"), "--skip_eval", "--output_dir",
            str(folder / "out"), "--deepspeed_config", write_deepspeed(folder / "json", stage, "bf16", **json_keys),
            *more]  # fmt: skip
    return prepare(parse(TrainingArguments, "test", argv), World(0, world, 0))


def write_checkpoint(settings: Settings, step: int) -> Path:
    """Write a checkpoint with two small files, as a finished save leaves it."""
    folder = CheckpointFolder(settings.output_dir)
    path = folder.path(step)
    path.mkdir(parents=True)
    for name in ("weights.pt", "moments.pt"):
        (path / name).write_bytes(name.encode())
    place = MixturePosition(step, (Position(0, 0, step),), ((),))
    layout = settings.layout()
    Summary(
        step, layout.pop("processes"), layout.pop("ZeRO stage"), layout.pop("precision"),
        {"type": settings.optimizer_type, "updates": step, "groups": 2, "layout": layout},
        settings.model.name, settings.model.shape(), order_state(settings.order_key, place),
        files={name: sums_of(path / name) for name in ("weights.pt", "moments.pt")},
    ).write(path)  # fmt: skip
    folder.point("latest", step)
    return path


def test_the_newest_is_taken_or_the_one_that_is_named(small_world: SmallWorld, tmp_path: Path) -> None:
    settings = settings_of(small_world, tmp_path)
    assert preview_resume(settings) is None
    for step in (10, 20):
        write_checkpoint(settings, step)
    assert preview_resume(settings) == 20
    assert preview_resume(settings_of(small_world, tmp_path, "--continue_from", "10")) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "never"], r"--resume never, but .* holds checkpoints \(the last: step 10\)"),
        (["--continue_from", "7"], "has no checkpoint of that step; it has: 10"),
        (["--seed", "7"], "another order of rows.*\n  seed: checkpoint 42, now 7\n.*--changed_order restart"),
        (["--packing", "False"], "packed: checkpoint True, now False"),
        (["--max_seq_length", "100"], "row_length: checkpoint 64, now 100"),
        (
            ["--model", "tiny"],
            "is of model .*\n  hidden_size: checkpoint 32, now 64\n(.|\n)*no option makes weights of one shape fit",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(
    small_world: SmallWorld, tmp_path: Path, options: list[str], message: str
) -> None:
    write_checkpoint(settings_of(small_world, tmp_path), 10)
    with pytest.raises(UserError, match=message):
        preview_resume(settings_of(small_world, tmp_path, *options))


def test_must_insists_on_a_checkpoint(small_world: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--resume must, but .* has no complete checkpoint: is --output_dir"):
        preview_resume(settings_of(small_world, tmp_path, "--resume", "must"))


def test_another_order_can_be_accepted(small_world: SmallWorld, tmp_path: Path) -> None:
    before = settings_of(small_world, tmp_path)
    write_checkpoint(before, 10)
    order = Summary.read(CheckpointFolder(before.output_dir).path(10)).order
    position, differences = position_to_resume_from(before, order)
    assert (position.row, differences) == (10, [])
    settings = settings_of(small_world, tmp_path, "--seed", "7", "--changed_order", "restart")
    assert preview_resume(settings) == 10
    position, differences = position_to_resume_from(settings, order)
    assert position == MixturePosition.start(1)
    assert differences == ["seed: checkpoint 42, now 7"]
    unchanged = settings_of(small_world, tmp_path, "--changed_order", "restart")
    assert position_to_resume_from(unchanged, order)[0].row == 10, "an order that is the same goes on where it was"


@pytest.mark.parametrize(
    ("world", "stage", "zero", "bridged"),
    [
        (1, 1, {}, False),
        (2, 1, {}, True),
        (1, 3, {}, True),
        (1, 1, {"offload_optimizer": {"device": "cpu"}}, True),
        (1, 1, {"round_robin_gradients": True}, True),
        (1, 1, {"reduce_bucket_size": 1_000_000}, False),
    ],
)
def test_another_layout_is_bridged(
    small_world: SmallWorld, tmp_path: Path, world: int, stage: int, zero: dict[str, object], bridged: bool
) -> None:
    path = write_checkpoint(settings_of(small_world, tmp_path), 10)
    settings = settings_of(small_world, tmp_path, world=world, stage=stage, zero_optimization={"stage": stage} | zero)
    assert check_fits(settings, path, Summary.read(path)) is bridged


def test_stage_0_has_everything_everywhere(small_world: SmallWorld, tmp_path: Path) -> None:
    path = write_checkpoint(settings_of(small_world, tmp_path, stage=0), 10)
    assert check_fits(settings_of(small_world, tmp_path, stage=0, world=2), path, Summary.read(path)) is False


def test_what_can_not_be_bridged_says_what_is_possible(small_world: SmallWorld, tmp_path: Path) -> None:
    lamb = {"optimizer": {"type": "Lamb", "params": {"lr": 1e-5}}}
    path = write_checkpoint(settings_of(small_world, tmp_path, **lamb), 10)
    assert check_fits(settings_of(small_world, tmp_path, **lamb), path, Summary.read(path)) is False
    with pytest.raises(
        UserError, match=r"processes: checkpoint 1, now 2\n.*the checkpoint has optimizer Lamb; only.*Adam.*\nGo on as"
    ):
        preview_resume(settings_of(small_world, tmp_path, world=2, **lamb))


def damage(path: Path, how: str) -> None:
    if how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
@pytest.mark.parametrize("file", ["weights.pt", "moments.pt", "checkpoint.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_taken(
    small_world: SmallWorld, tmp_path: Path, file: str, how: str
) -> None:
    settings = settings_of(small_world, tmp_path)
    for step in (10, 20):
        newest = write_checkpoint(settings, step)
    CheckpointFolder(settings.output_dir).point("best", 20)
    damage(newest / file, how)
    said: list[str] = []
    choice = choose_checkpoint(settings, CPU, said.append)
    assert choice is not None
    assert choice.step == 10
    assert len(said) == 1
    assert f"WARNING: the checkpoint of step 20 is damaged ({'' if file == 'checkpoint.json' else file}" in said[0]
    assert file in said[0]
    folder = CheckpointFolder(settings.output_dir)
    assert folder.steps() == [10]
    assert (folder.root / "damaged-step-00000020").is_dir(), "kept for whoever wants to look"
    assert folder.pointer("best") is None


def test_a_run_never_starts_anew_over_damaged_checkpoints(small_world: SmallWorld, tmp_path: Path) -> None:
    settings = settings_of(small_world, tmp_path)
    for step in (10, 20):
        damage(write_checkpoint(settings, step) / "weights.pt", "flipped")
    with pytest.raises(
        UserError, match=r"step-00000020 is damaged: (.|\n)*step-00000010 is damaged(.|\n)*no other to go on from"
    ):
        choose_checkpoint(settings, CPU, print)
    assert CheckpointFolder(settings.output_dir).steps() == [10, 20], "and leaves them where they are"


def test_the_one_that_is_named_is_not_replaced_by_another(small_world: SmallWorld, tmp_path: Path) -> None:
    settings = settings_of(small_world, tmp_path)
    for step in (10, 20):
        write_checkpoint(settings, step)
    damage(CheckpointFolder(settings.output_dir).path(20) / "weights.pt", "flipped")
    with pytest.raises(UserError, match="step-00000020 is damaged"):
        choose_checkpoint(settings_of(small_world, tmp_path, "--continue_from", "20"), CPU, print)


def test_two_runs_on_one_output_directory(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(small_world, tmp_path)
    settings.output_dir.mkdir()
    monkeypatch.setattr(rank_checks, "LOCK_SECONDS", 0.1)
    with FileLock(settings.output_dir / ".lock"), pytest.raises(UserError, match="another run is at work in it"):
        lock_output(settings.output_dir)
    lock_output(settings.output_dir).release()


def test_the_summary_says_what_a_checkpoint_is_of(small_world: SmallWorld, tmp_path: Path) -> None:
    path = write_checkpoint(settings_of(small_world, tmp_path, stage=2), 10)
    summary = json.loads((path / "checkpoint.json").read_text())
    assert (summary["step"], summary["zero_stage"], summary["precision"]) == (10, 2, "bf16")
    assert summary["files"]["weights.pt"]["size"] == len(b"weights.pt")


def test_an_output_dir_that_is_not_shared_is_refused_on_all_ranks(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path
) -> None:
    """As on two nodes whose disks are their own: the same path, another folder."""
    argvs = []
    for node in ("node-0", "node-1"):
        (tmp_path / node).mkdir()
        argvs.append(["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"),
                      "--skip_eval", "--output_dir", str(tmp_path / node / "out"), "--fp16", "False"])  # fmt: skip
    errors = two_ranks.run(shared_disk_error, argvs)
    assert errors[0] == errors[1].replace("node-1", "node-0")
    assert "is not one folder for all processes: what rank 0 writes on" in errors[0]
    assert "is not seen by rank 1 on" in errors[0]
    assert two_ranks.run(shared_disk_error, [argvs[0], argvs[0]]) == ["", ""]
    assert not list((tmp_path / "node-0" / "out").iterdir()), "nothing is left of the look"


def test_an_output_dir_without_renames_is_refused_on_all_ranks_before_anything_is_computed(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path
) -> None:
    argv = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
            "--fp16", "False", "--num_optim_steps", "2", "--output_dir"]  # fmt: skip
    with append_only(tmp_path / "out") as output:
        errors = two_ranks.run(renames_error, [*argv, str(output)])
        assert errors[0] == errors[1]
        assert errors[0].startswith(f"--output_dir {output}: its folders can't be renamed (Operation not permitted). ")
        launched = run([*python(), *argv, str(output)])
        assert launched.returncode == 2, launched.stderr
        assert errors[0] in launched.stderr
        assert "Traceback" not in launched.stderr
        assert not (output / "metrics.jsonl").exists()
    (tmp_path / "good").mkdir()
    assert two_ranks.run(renames_error, [*argv, str(tmp_path / "good")]) == ["", ""]
    assert not list((tmp_path / "good").iterdir()), "nothing is left of the trial"


def test_the_clock_wants_checkpoints_too(two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path) -> None:
    argv = ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
            "--fp16", "False", "--output_dir", str(tmp_path / "out"), "--num_optim_steps", "5", "--save_step", "100",
            "--keep_checkpoints", "0"]  # fmt: skip
    (end, _) = two_ranks.run(whole_run, [*argv, "--save_minutes", "0.00001"])
    assert end["code"] == 0
    assert CheckpointFolder(tmp_path / "out").steps() == [1, 2, 3, 4, 5]
    saves = [
        json.loads(line)
        for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        if "seconds_save" in line
    ]
    assert [save["step"] for save in saves] == [1, 2, 3, 4, 5]
    assert all(0 < save["save_share"] < 1 and save["seconds_save"] > 0 for save in saves)

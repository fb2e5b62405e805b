"""What version 0.1.0 of November 2026 wrote is read, checked and resumed; its shards come out byte for byte as they did
then.

`made_by_0_1_0` holds conversations, a model of 9,000 parameters, shards, and a run of two processes in fp32 under
ZeRO-1: its checkpoint of step 4, and its logs to step 8. It is never made anew: a change that this test does not
survive is a change of a format.
"""

import shutil
from pathlib import Path

import pytest

from dialogpt_ds.files import sha256_of_file
from dialogpt_ds.preprocessing import inspect
from dialogpt_ds.preprocessing.arguments import ShardArguments
from dialogpt_ds.preprocessing.make import make_shards
from tests.conftest import ROOT
from tests.ranks.rank_pool import RankPool
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import whole_run

BEFORE = ROOT / "tests" / "checkpoints" / "made_by_0_1_0"
SAME_BYTES = ("index.npz", "manifest.json", "shard-000000.tar", "tokenizer/tokenizer.json")
ROUNDING = 1e-5
"""Of a loss, where another processor adds in another order."""


def without_time(log: Path) -> list[list[float]]:
    """Return the figures of a train_log.txt but for the seconds at each line's end."""
    return [[float(figure) for figure in line.split(",")[:-1]] for line in log.read_text().splitlines()[1:]]


def eval_losses(log: Path) -> list[float]:
    """Return the losses of an eval_log.txt."""
    return [float(line.split(",")[3]) for line in log.read_text().splitlines()[1:]]


def test_the_same_conversations_give_the_same_shards(tmp_path: Path) -> None:
    make_shards(
        ShardArguments(
            [str(BEFORE / "conversations.tsv")], output=str(tmp_path), tokenizer=str(BEFORE / "model"),
            max_seq_length=64, workers=1, validation_fraction=0.1,
        ),
        say=lambda _: None,
    )  # fmt: skip
    for part in ("train", "validation"):
        different = [
            name
            for name in SAME_BYTES
            if sha256_of_file(tmp_path / part / name) != sha256_of_file(BEFORE / "shards" / part / name)
        ]
        assert different == []


def test_its_shards_are_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(BEFORE / "shards" / "train"), "--verify"]) == 0
    assert "3d4c50d98dab" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [2, 1])
def test_its_run_goes_on_as_it_did(two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, processes: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(BEFORE / "run", run)
    argv = ["--model", str(BEFORE / "model"), "--train_input_file", str(BEFORE / "shards" / "train"),
            "--eval_input_file", str(BEFORE / "shards" / "validation"), "--deepspeed_config", write_deepspeed(tmp_path,
                                                                                                              1,
                                                                                                              "fp32"),
            "--lr_schedule", "cosine", "--warmup_steps", "2", "--learning_rate", "1e-3", "--num_optim_steps", "8",
            "--train_batch_size", str(4 // processes), "--gradient_accumulation_steps", str(2 // processes),
            "--valid_step", "4", "--save_step", "4", "--sample_max_new_tokens", "4", "--resume", "must",
            "--output_dir", str(run)]  # fmt: skip
    for found in (two_ranks if processes == 2 else one_rank).run(whole_run, argv):
        assert found["code"] == 0
    before, after = without_time(BEFORE / "run" / "train_log.txt"), without_time(run / "train_log.txt")
    counted = (0, 1, 5, 6)  # epoch, step and tokens; one process takes twice as many micro-batches
    assert [[line[place] for place in counted] for line in after] == [
        [line[place] for place in counted] for line in before
    ]
    assert [line[3] for line in after] == pytest.approx([line[3] for line in before], abs=ROUNDING)
    losses = [eval_losses(folder / "eval_log.txt") for folder in (run, BEFORE / "run")]
    assert losses[0] == pytest.approx(losses[1], abs=ROUNDING)

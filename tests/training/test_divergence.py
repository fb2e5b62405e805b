"""Runs that diverge end with the step, the last good loss and the rows involved; the others are left alone."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dialogpt_ds.distributed.world import World
from dialogpt_ds.preprocessing.inspect import main as inspect
from dialogpt_ds.preprocessing.make import ShardArguments, make_shards
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.divergence import USUAL_STEPS, DivergenceWatch, Scale, Verdict
from dialogpt_ds.training.rank_report import RankReport, unpack
from dialogpt_ds.training.state import ProgressState
from dialogpt_ds.training.step import StepResult
from tests.conftest import write_tsv
from tests.ranks import rank_tasks
from tests.ranks.rank_pool import RankPool
from tests.ranks.run_tasks import whole_run

SmallWorld = tuple[Path, Path]
NO_SCALE = Scale(1.0, 1.0, None)


def result(loss: float, norm: float | None = 1.0, applied: bool = True) -> StepResult:
    return StepResult(loss, norm, applied, {}, {}, unpack(RankReport().pack(0, 1)))


def watch_of(small_world: SmallWorld, *options: str) -> DivergenceWatch:
    argv = [
        "--model",
        str(small_world[0]),
        "--train_input_file",
        str(small_world[1] / "train"),
        "--skip_eval",
        *options,
    ]
    return DivergenceWatch(rank_tasks.settings_of(World(0, 1, 0), argv), ProgressState())


def judged(watch: DivergenceWatch, step: StepResult, scale: Scale = NO_SCALE) -> Verdict:
    watch.state.global_step += 1
    return watch.judge(step, 1e-3, scale)


def test_skips_in_a_row_end_the_run_and_an_update_between_them_does_not(small_world: SmallWorld) -> None:
    watch = watch_of(small_world, "--max_skipped_steps", "3", "--fp16", "False")
    assert judged(watch, result(5.0)) == (None, None)
    for _ in range(4):
        for _ in range(3):
            end, warning = judged(watch, result(5.0, float("nan"), applied=False))
            assert end is None
            assert "its update was skipped on all ranks" in str(warning)
        assert judged(watch, result(4.5)) == (None, None)
    ends = [judged(watch, result(5.0, float("inf"), applied=False))[0] for _ in range(4)]
    assert ends[:3] == [None] * 3
    assert ends[3] == (
        "4 updates in a row were skipped, because gradients were not finite (loss 5.0000, gradient norm inf, learning "
        "rate 1.000e-03); the last good loss was 4.5000 at step 17"
    )


def test_fp16_may_skip_as_often_as_its_loss_scale_needs_to_come_down(small_world: SmallWorld, tmp_path: Path) -> None:
    config = tmp_path / "fp16.json"
    config.write_text(
        json.dumps({"fp16": {"enabled": True, "initial_scale_power": 32}, "zero_optimization": {"stage": 1}})
    )
    assert watch_of(small_world, "--deepspeed_config", str(config)).limit == 34
    assert watch_of(small_world).limit == 20
    assert watch_of(small_world, "--max_skipped_steps", "3").limit == 18


def test_losses_that_wander_are_no_spikes_and_one_that_jumps_is(small_world: SmallWorld) -> None:
    watch, source = watch_of(small_world), random.Random(0)
    level = 9.0
    for _ in range(400):
        level *= 0.997
        assert judged(watch, result(level + source.gauss(0.0, 0.3))) == (None, None)
    for _ in range(2):
        end, warning = judged(watch, result(level + 6.0))
        assert end is None
        assert re.search(
            rf"the loss of step 40[12] jumped to {level + 6:.4f}, usual are [23]\.\d+ \+- 0\.\d+", str(warning)
        )
    assert watch.state.loss_spikes == 2
    assert judged(watch, result(level)) == (None, None)


def test_nothing_is_a_spike_before_the_usual_loss_is_known_or_near_zero(small_world: SmallWorld) -> None:
    watch = watch_of(small_world)
    for number in range(USUAL_STEPS):
        assert judged(watch, result(10.0 if number % 10 else 500.0)) == (None, None)
    watch = watch_of(small_world)
    for _ in range(200):
        assert judged(watch, result(1e-3)) == (None, None)
    assert judged(watch, result(0.05)) == (None, None)


def broken_world(folder: Path) -> tuple[Path, Path, list[str]]:
    """A model whose embedding of `~` is no number (and whose head is its own), and shards with one conversation that
    has it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.helpers.small_world import byte_tokenizer

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = GPT2Config(
        vocab_size=257, n_layer=2, n_embd=32, n_head=2, n_positions=128, bos_token_id=256, eos_token_id=256
    )
    config.tie_word_embeddings = False
    model = GPT2LMHeadModel(config)
    model.transformer.wte.weight.data[tokenizer("~").input_ids[0]] = float("nan")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = write_tsv(folder / "good.tsv", 80).read_text().splitlines()
    lines.insert(40, "1.0 how are ~ you EOS 1.0 fine\t1.0 good")
    (folder / "all.tsv").write_text("\n".join(lines) + "\n")
    arguments = ShardArguments(
        [str(folder / "all.tsv")],
        output=str(folder / "data"),
        tokenizer=str(folder / "model"),
        max_seq_length=64,
        workers=1,
    )
    make_shards(arguments, say=lambda _: None)
    directory = ShardDirectory.open(str(folder / "data"), "test")
    tilde = tokenizer("~").input_ids[0]
    names = []
    for block in range(directory.num_blocks):
        content = directory.block(block)
        for example in range(int(directory.index.examples[block])):
            if tilde in content.examples(example, example + 1).tokens.tolist():
                names.append(f"{block}:{example}")
    return folder / "model", folder / "data", names


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_a_loss_that_is_no_number_names_the_rows_it_comes_from(
    two_ranks: RankPool, tmp_path: Path, stage: int, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, names = broken_world(tmp_path)
    argv = ["--model", str(model), "--train_input_file", str(data), "--skip_eval", "--num_optim_steps", "100",
            "--output_dir", str(tmp_path / "out"),
            "--deepspeed_config", rank_tasks.write_deepspeed(tmp_path, stage, precision)]  # fmt: skip
    ends = two_ranks.run(whole_run, argv)
    said = str(ends[0]["code"])
    assert ends[1]["code"] == said, "all ranks end together, with the same words"
    assert re.search(r"step \d+: training has diverged: the loss is nan \(loss nan, gradient norm .*\)", said), said
    assert re.search(r"the last good loss was \d\.\d+ at step \d+|there was no good step before", said)
    assert re.search(r"[1-3] of 8 rows have a loss that is not finite:\n  row \d: loss nan: ", said)
    where = re.findall(r"shard-000000\.tar examples ([\d: ]+)", said)
    found = {name for listed in where for name in listed.split()}
    assert found & set(names), (said, names)
    assert "What helps:" in said
    assert inspect([str(data), "--at", *sorted(found & set(names))]) == 0
    assert "how are ~ you" in capsys.readouterr().out


def test_weights_that_are_no_numbers_are_told_from_bad_rows(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path
) -> None:
    model, shards = small_world
    argv = ["--model", str(model), "--train_input_file", str(shards / "train"), "--skip_eval", "--num_optim_steps",
            "20", "--output_dir", str(tmp_path / "out"), "--deepspeed_config", rank_tasks.write_deepspeed(tmp_path, 0,
                                                                                                          "fp32"),
            "--lr_schedule", "None", "--learning_rate", "1e30"]  # fmt: skip
    said = str(two_ranks.run(whole_run, argv)[0]["code"])
    assert "all 8 rows have a loss that is not finite: it is the weights that are broken, not the data" in said
    assert "no checkpoint has been saved yet" in said


@pytest.mark.parametrize(
    ("stage", "options", "expected"),
    [
        (
            0,
            {"initial_scale_power": 24, "min_loss_scale": 2**24},
            "gradients overflow fp16 at the lowest loss scale, 1.67772e+07",
        ),
        (
            2,
            {"initial_scale_power": 24, "min_loss_scale": 2**24},
            "gradients overflow fp16 at the lowest loss scale, 1.67772e+07",
        ),
        (3, {"loss_scale": 2.0**28}, "4 updates in a row were skipped, because gradients were not finite"),
    ],
)
def test_fp16_that_can_make_no_update_ends_with_the_reason(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path, stage: int, options: dict[str, Any], expected: str
) -> None:
    model, shards = small_world
    config = rank_tasks.write_deepspeed(tmp_path, stage, "fp16", fp16=options)
    argv = ["--model", str(model), "--train_input_file", str(shards / "train"), "--skip_eval", "--num_optim_steps",
            "60", "--output_dir", str(tmp_path / "out"), "--deepspeed_config", config, "--max_skipped_steps",
            "3"]  # fmt: skip
    said = str(two_ranks.run(whole_run, argv, True)[0]["code"])
    assert expected in said
    assert "all 8 rows have a finite loss" in said
    assert "train in bf16 or fp32" in said
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["skipped_steps"] == len(metrics), "every one was counted"
    assert len({m["lr"] for m in metrics}) == 1, "and none moved the schedule on"

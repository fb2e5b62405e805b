"""Exports: whole, equal to the live model, usable with plain transformers, from any ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dialogpt_ds.checkpoints.folder import CheckpointFolder
from dialogpt_ds.errors import RunError
from dialogpt_ds.export.command import main
from dialogpt_ds.export.folder import Probe, exported_step, probe, write_export
from dialogpt_ds.files import sha256_of_file
from tests.helpers.rank_pool import RankPool
from tests.helpers.rank_tasks import write_deepspeed
from tests.helpers.run_tasks import weights_of, whole_run

SmallWorld = tuple[Path, Path]


def train(two_ranks: RankPool, small_world: SmallWorld, output: Path, stage: int, precision: str, **more: object) -> Path:
    model, shards = small_world
    output.parent.mkdir(parents=True, exist_ok=True)
    argv = [
        "--model", str(model), "--train_input_file", str(shards / "train"), "--eval_input_file", str(shards / "validation"),
        "--deepspeed_config", write_deepspeed(output.parent, stage, precision, **more), "--output_dir", str(output),
        "--num_optim_steps", "4", "--valid_step", "2", "--lr_schedule", "None", "--learning_rate", "1e-3",
    ]  # fmt: skip
    ends = two_ranks.run(whole_run, argv, precision == "fp16")
    assert {end["code"] for end in ends} == {0}, ends
    return output


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (0, "fp16"), (1, "bf16"), (2, "fp16"), (3, "fp32"), (3, "bf16")]
)
def test_a_checkpoint_of_any_stage_gives_the_weights_that_the_run_exported(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path, stage: int, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train(two_ranks, small_world, tmp_path / "out", stage, precision)
    assert main([str(output), str(tmp_path / "exported")]) == 0
    assert "exported: step 4 of" in capsys.readouterr().out
    assert weights_of(output) == sha256_of_file(tmp_path / "exported" / "model.safetensors")
    assert exported_step(tmp_path / "exported") == 4
    for name in ("config.json", "generation_config.json", "tokenizer.json", "README.md"):
        mine, theirs = (folder / name for folder in (output / "model", tmp_path / "exported"))
        assert mine.read_text() == theirs.read_text(), name


def test_the_five_lines_of_the_readme(two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path) -> None:
    output = train(two_ranks, small_world, tmp_path / "out", 1, "bf16")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    prompt = tokenizer("Does money buy happiness?" + tokenizer.eos_token, return_tensors="pt").input_ids
    reply = model.generate(prompt, max_length=100, pad_token_id=tokenizer.eos_token_id)
    assert reply.shape[1] > prompt.shape[1]
    assert prompt[0, -1] == tokenizer.eos_token_id
    assert model.config.trained_max_length == 64
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.bfloat16


def test_the_card_says_what_was_trained_on_and_how_well(two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path) -> None:
    output = train(two_ranks, small_world, tmp_path / "out", 1, "fp32")
    card = (output / "model" / "README.md").read_text()
    loss = (output / "eval_log.txt").read_text().splitlines()[-1].split(",")[3]
    manifest = json.loads((small_world[1] / "train" / "manifest.json").read_text())
    for words in (
        f"{float(loss):.4f}",
        manifest["fingerprint"][:16],
        "| optimizer steps | 4 |",
        "rows of at most 64 tokens",
        "| seed | 42 |",
    ):
        assert words in card, words


def test_the_best_or_a_named_checkpoint_in_another_type(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train(two_ranks, small_world, tmp_path / "out", 2, "bf16")
    CheckpointFolder(output).point("best", 2)
    assert main([str(output), str(tmp_path / "best"), "--best", "--dtype", "fp32"]) == 0
    assert exported_step(tmp_path / "best") == 2
    assert json.loads((tmp_path / "best" / "config.json").read_text())["dtype"] == "float32"
    assert main([str(output / "checkpoints" / "step-00000002"), str(tmp_path / "best")]) == 2
    assert "exists; name another folder, or give --overwrite" in capsys.readouterr().err
    assert main([str(output / "checkpoints" / "step-00000004"), str(tmp_path / "best"), "--overwrite"]) == 0
    assert exported_step(tmp_path / "best") == 4


def test_mistakes(two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is no checkpoint (it has no checkpoint.json), and no output_dir with a checkpoint" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "give two folders, CHECKPOINT and DIR; got 1" in capsys.readouterr().err
    output = train(two_ranks, small_world, tmp_path / "run", 1, "bf16")
    weights = output / "checkpoints" / "step-00000004" / "mp_rank_00_model_states.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main([str(output), str(tmp_path / "out")]) == 2
    assert "is damaged: mp_rank_00_model_states.pt has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_that_says_something_else_is_not_called_done(small_world: SmallWorld, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(small_world[0])
    weights = {name: parameter.detach().clone() for name, parameter in live.named_parameters()}
    description = tmp_path / "description"
    shutil.copytree(small_world[0], description)
    (description / "model.safetensors").unlink()
    said = probe(live, torch.device("cpu"))
    write_export(weights, said, description, tmp_path / "good", "card", 1)
    assert exported_step(tmp_path / "good") == 1
    with pytest.raises(RunError, match="doesn't say what the trained model says"):
        write_export(weights, Probe(said.logits + 0.1, said.device), description, tmp_path / "bad", "card", 1)
    # A configuration that lost something of the model's, here the function between the layers.
    config = json.loads((description / "config.json").read_text())
    (description / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(RunError, match="doesn't say what the trained model says"):
        write_export(weights, said, description, tmp_path / "bad", "card", 1)
    del weights["transformer.wpe.weight"]
    with pytest.raises(RunError, match=r"lack 1 tensors of the model in .*: transformer\.wpe\.weight"):
        write_export(weights, said, description, tmp_path / "bad", "card", 1)
    assert not (tmp_path / "bad").exists()
    assert not list(tmp_path.glob("unfinished-*"))


def test_an_export_that_is_not_whole_is_none(small_world: SmallWorld, tmp_path: Path) -> None:
    assert exported_step(tmp_path) is None
    (tmp_path / "weights").write_bytes(b"123")
    origin = {"step": 7, "files": {"weights": {"size": 3, "sha256": ""}}}
    (tmp_path / "exported_from.json").write_text(json.dumps(origin))
    assert exported_step(tmp_path) == 7
    (tmp_path / "weights").write_bytes(b"12")
    assert exported_step(tmp_path) is None

"""Exports: whole, equal to the live model, usable with plain transformers, from any ZeRO stage."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dialogpt_ds.checkpoints.folder import CheckpointFolder
from dialogpt_ds.commands.export import main
from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import RunError
from dialogpt_ds.export.folder import exported_step, probe, write_export
from dialogpt_ds.files import sha256_of_file
from tests.ranks.rank_pool import RankPool
from tests.ranks.rank_tasks import write_deepspeed
from tests.ranks.run_tasks import weights_of, whole_run

SmallWorld = tuple[Path, Path]


def train(
    two_ranks: RankPool, small_world: SmallWorld, output: Path, stage: int, precision: str, **more: object
) -> Path:
    model, shards = small_world
    output.parent.mkdir(parents=True, exist_ok=True)
    argv = [
        "--model", str(model), "--train_input_file", str(shards / "train"), "--eval_input_file",
        str(shards / "validation"), "--deepspeed_config", write_deepspeed(output.parent, stage, precision, **more),
        "--output_dir", str(output), "--num_optim_steps", "4", "--valid_step", "2", "--lr_schedule", "None",
        "--learning_rate", "1e-3",
    ]  # fmt: skip
    ends = two_ranks.run(whole_run, argv, precision == "fp16")
    assert {end["code"] for end in ends} == {0}, ends
    return output


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (0, "fp16"), (1, "bf16"), (2, "fp16"), (3, "fp32"), (3, "bf16")]
)
def test_a_checkpoint_of_any_stage_gives_the_weights_that_the_run_exported(
    two_ranks: RankPool,
    small_world: SmallWorld,
    tmp_path: Path,
    stage: int,
    precision: str,
    capsys: pytest.CaptureFixture[str],
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


def test_the_card_says_what_was_trained_on_and_how_well(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path
) -> None:
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


def test_mistakes(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert (
        "is no checkpoint (it has no checkpoint.json), and no output_dir with a checkpoint" in capsys.readouterr().err
    )
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
        write_export(weights, replace(said, logits=said.logits + 0.1), description, tmp_path / "bad", "card", 1)
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


def live_and_described(small_world: SmallWorld, folder: Path) -> tuple[Any, dict[str, torch.Tensor], Path]:
    """Return a model, its weights, and the description that an export of it needs."""
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(small_world[0])
    description = Path(shutil.copytree(small_world[0], folder / "description"))
    (description / "model.safetensors").unlink()
    return live, {name: parameter.detach().clone() for name, parameter in live.named_parameters()}, description


def without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model on its way to a GPU find it full."""
    from transformers import PreTrainedModel

    honest = PreTrainedModel.to

    def to(self: Any, *where: Any, **more: Any) -> Any:
        if any(isinstance(place, torch.device) and place.type == "cuda" for place in where):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return honest(self, *where, **more)

    monkeypatch.setattr(PreTrainedModel, "to", to)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_without_room_lets_the_cpu_compare(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    live, weights, description = live_and_described(small_world, tmp_path)
    live = live.to(dtype)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    without_room(monkeypatch)
    said = replace(probe(live, torch.device("cpu")), device=torch.device("cuda", 0))
    assert write_export(weights, said, description, tmp_path / "good", "card", 1) is None
    assert exported_step(tmp_path / "good") == 1
    config = json.loads((description / "config.json").read_text())
    (description / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(RunError, match="doesn't say what the trained model says"):
        write_export(weights, said, description, tmp_path / "bad", "card", 1)
    assert not (tmp_path / "bad").exists()


def test_where_nothing_can_compare_logits_the_weights_were_and_a_warning_says_so(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dialogpt_ds.export import folder

    live, weights, description = live_and_described(small_world, tmp_path)
    without_room(monkeypatch)
    said = replace(probe(live, torch.device("cpu")), device=torch.device("cuda", 0))

    def no_memory(*_: Any) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(folder, "_both_in_fp32", no_memory)
    assert write_export(weights, said, description, tmp_path / "good", "card", 1) == (
        "warning: the weights of the export were compared bit for bit and are equal; the logits were not compared (on "
        "cuda:0: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.; on the CPU: MemoryError: "
        "std::bad_alloc)"
    )
    assert exported_step(tmp_path / "good") == 1
    # What was written is held against the weights all the same.
    monkeypatch.setattr(folder, "_model_of", lambda *_: live)
    weights["transformer.wpe.weight"] += 1
    with pytest.raises(RunError, match=r"tensors that differ: transformer\.wpe\.weight"):
        write_export(weights, said, description, tmp_path / "bad", "card", 1)


def test_a_compiled_model_is_not_compiled_anew_to_be_compared(small_world: SmallWorld) -> None:
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(small_world[0])
    plain = probe(live, torch.device("cpu")).logits

    def compiler(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    live.base_model.compile(backend=compiler, dynamic=False)
    assert torch.equal(probe(live, torch.device("cpu")).logits, plain)


def run_with_failing(world: World, argv: list[str], owner: str, name: str) -> Any:
    """Do a whole run in which a function of export/folder.py or of transformers fails with a plain Exception, on rank 0
    alone."""
    from importlib import import_module

    module, _, attribute = owner.partition(":")
    place = getattr(import_module(module), attribute) if attribute else import_module(module)
    honest = getattr(place, name)

    def failing(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    try:
        if world.is_first:
            setattr(place, name, failing)
        return whole_run(world, argv)["code"]
    finally:
        setattr(place, name, honest)


def failing_argv(small_world: SmallWorld, output: Path) -> list[str]:
    return [
        "--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
        "--output_dir", str(output), "--deepspeed_config", write_deepspeed(output.parent, 1, "fp32"),
        "--num_optim_steps", "2", "--lr_schedule", "None",
    ]  # fmt: skip


def test_whatever_fails_in_the_writing_of_an_export_ends_all_ranks_in_order(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path
) -> None:
    where = ("transformers:PreTrainedModel", "save_pretrained")
    ends = two_ranks.run(run_with_failing, failing_argv(small_world, tmp_path / "out"), *where)
    model = tmp_path / "out" / "model"
    assert (
        ends == [f"failed while exporting the model to {model}: Exception: No space left on device (os error 28)"] * 2
    )
    assert not model.exists()
    assert not list((tmp_path / "out").glob("unfinished-*"))


def test_a_model_that_gives_no_logits_at_the_end_is_exported_with_a_warning(
    two_ranks: RankPool, small_world: SmallWorld, tmp_path: Path
) -> None:
    where = ("dialogpt_ds.training.saver", "probe")
    assert two_ranks.run(run_with_failing, failing_argv(small_world, tmp_path / "out"), *where) == [0, 0]
    assert exported_step(tmp_path / "out" / "model") == 2


def test_an_export_that_is_not_whole_is_none(small_world: SmallWorld, tmp_path: Path) -> None:
    assert exported_step(tmp_path) is None
    (tmp_path / "weights").write_bytes(b"123")
    origin = {"step": 7, "files": {"weights": {"size": 3, "sha256": ""}}}
    (tmp_path / "exported_from.json").write_text(json.dumps(origin))
    assert exported_step(tmp_path) == 7
    (tmp_path / "weights").write_bytes(b"12")
    assert exported_step(tmp_path) is None

"""Looking before training: the dry run, the final configuration, the picture of the schedule. None of them writes into
output_dir."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dialogpt_ds.model.activation import recompute_activations
from dialogpt_ds.model.loss import TargetLoss
from dialogpt_ds.model.memory import largest_layer, model_states
from dialogpt_ds.model.saved_bytes import activations_measured
from tests.conftest import ROOT
from tests.ranks import rank_tasks
from tests.ranks.launch import clean_environment, deepspeed, torchrun
from tests.ranks.rank_pool import RankPool

SmallWorld = tuple[Path, Path]


def train(*options: str, command: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    words = [*(command or [sys.executable, str(ROOT / "launch" / "train.py")]), *options]
    return subprocess.run(words, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)


def options_of(small_world: SmallWorld, output: Path) -> list[str]:
    return ["--model", str(small_world[0]), "--train_input_file", str(small_world[1] / "train"), "--skip_eval",
            "--output_dir", str(output), "--num_optim_steps", "500", "--lr_schedule", "cosine", "--warmup_steps",
            "20"]  # fmt: skip


def test_a_dry_run_says_what_sixteen_processes_would_need_and_takes_two_steps(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    options = [*options_of(small_world, tmp_path / "out"), "--expect_world_size", "16", "--train_batch_size", "2"]
    done = train(*options, "--gradient_accumulation_steps", "1", "--dry_run", "--gpu", "a100 40gb")
    assert done.returncode == 0, done.stdout + done.stderr
    check_forecast(done.stdout)
    assert "2 rows * 1 micro-batches * 16 processes = 32 rows of 64 = 2,048 tokens a step" in done.stdout
    assert re.search(r"epoch +about \d+ steps", done.stdout)
    assert "fp16: this machine has none, so the steps of the dry run are in fp32" in done.stdout
    assert "memory with 16 GPUs in fp16, GiB" in done.stdout
    for name in (
        "ZeRO-0",
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-2, optimizer on the host",
        "ZeRO-3",
        "ZeRO-3, optimizer and weights on the host",
    ):
        assert re.search(rf"\n  {name} +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d", done.stdout), name
    assert re.search(r"ZeRO-1 .* <- this run", done.stdout)
    losses = re.findall(r"step [12] loss (\d+\.\d+)", done.stdout)
    assert len(losses) == 2
    assert all(5.0 < float(loss) < 6.5 for loss in losses), "a new model's, for 257 ids"
    assert not (tmp_path / "out").exists()


def check_forecast(printed: str) -> None:
    """Look at what is said about 16 A100s: on two hosts, in the run's fp16, which the machine that says it has not."""
    assert re.search(
        r"modelled, not measured: 16 A100-40 over Ethernet of 100 Gbit/s, ZeRO-1, fp16 \(against \d+ published "
        r"figures .* times",
        printed,
    )
    assert re.search(
        r"2 rows of 64 on A100-40 with varlen attention, by the shapes of all tensors: 0\.00 kept", printed
    )
    found = re.search(
        r"  ([\d,]+) tokens/s, ([\d,]+) each GPU, MFU \d+%; a step of ([\d,.]+) ms; an epoch in (.*)\n  memory: "
        r"(\d\.\d) GiB of",
        printed,
    )
    assert found
    everything, each, milliseconds = (float(number.replace(",", "")) for number in found.groups()[:3])
    assert everything == pytest.approx(16 * each, rel=1e-3)
    assert 0.9 * 128 <= each * milliseconds / 1e3 <= 128, "two rows of 64, nearly full"
    parts = re.findall(r"^  [a-zA-Z ]+  +([\d.]+) ms +\d+%$", printed, re.MULTILINE)
    assert len(parts) == 11
    assert sum(float(part) for part in parts) == pytest.approx(milliseconds, abs=0.2)


def test_a_dry_run_under_the_launcher_is_one_process(small_world: SmallWorld, tmp_path: Path) -> None:
    done = train(*options_of(small_world, tmp_path / "out"), "--dry_run", "--fp16", "False", command=deepspeed(2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("dry run: nothing was written") == 1
    assert "memory with 2 GPUs in fp32" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_steps_of_a_dry_run_are_those_of_the_run(small_world: SmallWorld, tmp_path: Path) -> None:
    options = [*options_of(small_world, tmp_path / "out"), "--fp16", "False"]
    dry = train(*options, "--dry_run")
    real = train(
        *options[:-6], "--num_optim_steps", "2", "--lr_schedule", "cosine", "--warmup_steps", "20", "--fp16", "False"
    )
    assert real.returncode == 0, real.stderr
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert re.findall(r"step [12] loss (\d+\.\d+)", dry.stdout) == [f"{loss:.4f}" for loss in losses]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_schedule_is_drawn_and_nothing_trained(small_world: SmallWorld, tmp_path: Path, kind: str) -> None:
    picture = tmp_path / "pictures" / f"schedule.{kind}"
    done = train(*options_of(small_world, tmp_path / "out"), "--plot_schedule", str(picture))
    assert done.returncode == 0, done.stderr
    assert re.search(r"schedule cosine: peak rate 1\.000e-05 at step 20 of 500, drawn in ", done.stdout)
    assert picture.read_bytes().startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert picture.stat().st_size > 5_000
    assert not (tmp_path / "out").exists()


def test_a_picture_of_no_kind_is_refused(small_world: SmallWorld, tmp_path: Path) -> None:
    done = train(*options_of(small_world, tmp_path / "out"), "--plot_schedule", "schedule.jpg")
    assert done.returncode == 2
    assert "--plot_schedule 'schedule.jpg': the name must end in .png or .svg" in done.stderr


def test_the_states_are_those_of_the_papers_arithmetic() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 GPUs need 120, 31.4, 16.6 and 1.9 GB of 16 bytes
    a parameter.

    DeepSpeed's estimators add the fp32 gradient, 4 bytes a parameter more, of which stages 1 to 3 divide all.
    """
    states = {s.name: s.device / 1e9 for s in model_states(7_500_000_000, 0, 8, 8, "bf16")}
    assert states["ZeRO-0"] == pytest.approx(120 + 30)
    assert states["ZeRO-1"] == pytest.approx(31.4 + 30 / 64, abs=0.1)
    assert states["ZeRO-3"] == pytest.approx(1.9 + 30 / 64, abs=0.3)
    assert states["ZeRO-2, optimizer on the host"] == pytest.approx(15)
    fp32 = {s.name: s.device / 1e9 for s in model_states(7_500_000_000, 0, 8, 8, "fp32")}
    assert fp32["ZeRO-0"] == pytest.approx(7.5 * 16)
    assert fp32["ZeRO-1"] == pytest.approx(7.5 * 8 + 7.5 * 12 / 64)


def kept_for_backward(chunked_head: bool = False, checkpointed: bool = False) -> int:
    """Bytes that a GPT-2's loss on 512 targets keeps."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=5_000, n_layer=4, n_embd=64, n_head=2))
    loss_of = TargetLoss(model, chunked_head).train()
    if checkpointed:
        recompute_activations(model)
    ids, places = torch.randint(0, 5_000, (8, 128)), torch.arange(128).repeat(8, 1)
    targets = torch.arange(0, 1_024, 2)
    starts = torch.arange(0, 1_025, 128, dtype=torch.int32)
    with activations_measured(loss_of) as saved:
        loss_of(
            ids, places, targets, ids.flatten()[targets + 1], torch.ones(512), torch.zeros_like(targets), starts, 128
        )
    return saved.total


def test_the_options_that_save_memory_do() -> None:
    usual = kept_for_backward()
    assert kept_for_backward(chunked_head=True) <= usual - 512 * 5_000 * 4, "the logits are not kept"
    assert kept_for_backward(checkpointed=True) < usual - 4 * 10 * 8 * 128 * 64 * 4, "nor ten states a layer"


def test_torch_compile_compiles_all_but_the_head() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=1, n_embd=16, n_head=2))
    TargetLoss(model).compile_body()
    assert model.base_model._compiled_call_impl is not None
    assert model._compiled_call_impl is None
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_a_dry_run_under_torchrun_is_one_process_too(small_world: SmallWorld, tmp_path: Path) -> None:
    done = train(*options_of(small_world, tmp_path / "out"), "--dry_run", "--fp16", "False", command=torchrun(2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("dry run: nothing was written") == 1


def test_a_dry_run_of_an_offload_that_this_machine_lacks_goes_without(small_world: SmallWorld, tmp_path: Path) -> None:
    config = str(ROOT / "ds_configs" / "zero3_fp16_offload_nvme.json")
    done = train(
        *options_of(small_world, tmp_path / "out"),
        "--dry_run",
        "--deepspeed_config",
        config,
        "--expect_world_size",
        "12",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the steps of the dry run are without offload, which this machine can't do" in done.stdout
    assert "memory with 12 GPUs in fp16" in done.stdout
    assert "ZeRO-3, optimizer and weights on the host" in done.stdout.split("<- this run")[0].splitlines()[-1]


@pytest.mark.parametrize("stage", [0, 3])
def test_activations_are_the_same_whatever_the_stage(
    one_rank: RankPool, small_world: SmallWorld, tmp_path: Path, stage: int
) -> None:
    """ZeRO-3 gives weights other memory while they are gathered, which is not to be taken for activations."""
    found = {}
    for number in (1, stage):
        zero = {"stage": number, "stage3_param_persistence_threshold": 0}
        config = rank_tasks.write_deepspeed(tmp_path, number, "fp32", zero_optimization=zero)
        argv = [*options_of(small_world, tmp_path / "out"), "--deepspeed_config", config]
        found[number] = one_rank.run(rank_tasks.activation_bytes, argv)[0]
    assert found[stage] == found[1] > 100_000


def test_activations_are_counted_once_and_without_weights() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    rows = torch.zeros(10, 8)
    with activations_measured(layers) as saved:
        layers(rows)
    # The first layer's input, and the ReLU's output, which the ReLU and the last layer share.
    assert saved.total == (10 * 8 + 10 * 16) * 4
    assert largest_layer(layers) == 8 * 16 + 16

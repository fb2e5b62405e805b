"""Training as users start it: the real deepspeed launcher at every ZeRO stage, torchrun, plain python."""

import json
import math
from pathlib import Path

import pytest
import torch

from dialogpt_ds.dashboard.panels import DASHBOARD
from dialogpt_ds.logs.metrics import METRICS, STEP
from dialogpt_ds.logs.text_logs import EVAL_HEADER, TRAIN_HEADER
from tests.ranks.launch import TRAIN_FP16_ON_CPU, TRAIN_ON_OLD_GPU, deepspeed, python, run, torchrun
from tests.ranks.rank_tasks import write_deepspeed

STEPS = 6
SmallWorld = tuple[Path, Path]


def options(small_world: SmallWorld, output: Path, config: str, *more: str) -> list[str]:
    model, shards = small_world
    return [
        "--model", str(model), "--train_input_file", str(shards / "train"), "--eval_input_file",
        str(shards / "validation"), "--deepspeed_config", config, "--output_dir", str(output), "--num_optim_steps",
        str(STEPS), "--valid_step", "4", "--save_step", "3", "--lr_schedule", "None", "--learning_rate", "1e-3", *more,
    ]  # fmt: skip


def train_losses(output: Path) -> list[float]:
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [m["loss"] for m in metrics if "loss" in m]


def check_output(output: Path, done: str) -> None:
    """Check everything that ARCHITECTURE promises of an output directory after a whole run."""
    lines = (output / "train_log.txt").read_text().splitlines()
    assert lines[0] == TRAIN_HEADER
    assert [int(line.split(",")[1]) for line in lines[1:]] == list(range(1, STEPS + 1))
    evaluations = (output / "eval_log.txt").read_text().splitlines()
    assert evaluations[0] == EVAL_HEADER
    assert [int(line.split(",")[1]) for line in evaluations[1:]] == [4, 6]
    loss, perplexity = (float(x) for x in evaluations[-1].split(",")[3:])
    assert perplexity == pytest.approx(math.exp(loss))
    assert (output / "checkpoints" / "latest").read_text().strip() == "step-00000006"
    summary = json.loads((output / "checkpoints" / "step-00000006" / "checkpoint.json").read_text())
    assert all(
        (output / "checkpoints" / "step-00000006" / name).stat().st_size == f["size"]
        for name, f in summary["files"].items()
    )
    assert not list((output / "checkpoints").glob("unfinished*"))
    assert len(list((output / "wandb").glob("offline-run-*"))) == 1, "one wandb run, on rank 0"
    assert (output / "run_config.yaml").is_file()
    assert (output / "ds_config.json").is_file()
    assert f"done        {STEPS} steps" in done
    check_metrics(output)
    assert done.count("evaluation at step 6") == 1, "rank 0 alone speaks"
    generate_from(output / "model", loss)


def check_metrics(output: Path) -> None:
    """Check that everything that is logged has a meaning, and that everything with a meaning is logged."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    logged = {name for row in rows for name in row}
    of_gpus = {"gpu_memory_gib", "gpu_reserved_gib", "gpu_alloc_retries"}
    not_here = of_gpus | {
        "failed_saves",
        "loss_turn_3",
        "loss_turn_4_plus",
        "eval_loss_turn_3",
        "eval_loss_turn_4_plus",
    }
    assert logged == {STEP, *METRICS} - not_here, "no GPU, no save that failed, examples of two turns"
    on_the_dashboard = {name for section in DASHBOARD for panel in section.panels for name in panel.metrics}
    assert on_the_dashboard - not_here <= logged


def generate_from(model_folder: Path, eval_loss: float) -> None:
    """The export loads in plain transformers and generates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    prompt = torch.tensor([[*tokenizer("hello").input_ids, tokenizer.eos_token_id]])
    answer = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert answer.shape[1] > prompt.shape[1]
    assert math.isfinite(eval_loss)


@pytest.fixture(scope="module")
def reference(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one plain process in fp32 with as many rows a step."""
    folder = tmp_path_factory.mktemp("reference")
    config = write_deepspeed(folder, 0, "fp32")
    result = run(
        python()
        + options(small_world, folder / "out", config, "--train_batch_size", "8", "--gradient_accumulation_steps", "2")
    )
    assert result.returncode == 0, result.stderr
    check_output(folder / "out", result.stdout)
    return train_losses(folder / "out")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_deepspeed_launcher_at_every_zero_stage(
    small_world: SmallWorld, reference: list[float], tmp_path: Path, stage: int
) -> None:
    config = write_deepspeed(tmp_path, stage, "bf16" if stage in (1, 3) else "fp32")
    result = run(deepspeed(2) + options(small_world, tmp_path / "out", config))
    assert result.returncode == 0, result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    check_output(tmp_path / "out", result.stdout)
    tolerance = 2e-2 if stage in (1, 3) else 1e-5
    assert train_losses(tmp_path / "out") == pytest.approx(reference, abs=tolerance), (
        "the same training on any number of ranks"
    )


def test_torchrun(small_world: SmallWorld, reference: list[float], tmp_path: Path) -> None:
    result = run(torchrun(2) + options(small_world, tmp_path / "out", write_deepspeed(tmp_path, 1, "fp32")))
    assert result.returncode == 0, result.stderr + result.stdout
    check_output(tmp_path / "out", result.stdout)
    assert train_losses(tmp_path / "out") == pytest.approx(reference, abs=1e-5)


def test_fp16_with_a_real_loss_scaler_under_the_launcher(
    small_world: SmallWorld, reference: list[float], tmp_path: Path
) -> None:
    """From 2**19 the first updates overflow and are skipped; the schedule waits, the scale is halved, training goes
    on."""
    config = write_deepspeed(tmp_path, 2, "fp16", fp16={"initial_scale_power": 19, "hysteresis": 1})
    result = run(deepspeed(2, TRAIN_FP16_ON_CPU) + options(small_world, tmp_path / "out", config))
    assert result.returncode == 0, result.stderr + result.stdout
    check_output(tmp_path / "out", result.stdout)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "loss" in m]
    skipped = steps[-1]["skipped_steps"]
    assert 1 <= skipped < STEPS
    assert steps[-1]["loss_scale"] == 2.0 ** (19 - skipped)
    assert steps[skipped]["loss"] == pytest.approx(reference[0], abs=0.3)


def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(small_world: SmallWorld, tmp_path: Path) -> None:
    config = write_deepspeed(tmp_path, 2, "bf16")
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert run(deepspeed(2) + options(small_world, whole, config)).returncode == 0
    first = run([*deepspeed(2), *options(small_world, halved, config), "--num_optim_steps", "3"])
    assert first.returncode == 0, first.stderr
    second = run(deepspeed(2) + options(small_world, halved, config, "--resume", "must"))
    assert second.returncode == 0, second.stderr
    assert "resumed     from step 3" in second.stdout
    assert train_losses(halved) == train_losses(whole), "bit for bit"
    assert (halved / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    done = run(deepspeed(2) + options(small_world, halved, config))
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    changed = run(
        [*deepspeed(2), *options(small_world, halved, config), "--num_optim_steps", "7", "--learning_rate", "5e-4"]
    )
    assert changed.returncode == 0, changed.stderr
    last = [json.loads(line) for line in (halved / "metrics.jsonl").read_text().splitlines() if '"lr"' in line][-1]
    assert (last["step"], last["lr"]) == (7, 5e-4), "the rate that was asked for holds from the first step on"
    assert json.loads((halved / "model" / "exported_from.json").read_text())["step"] == 7
    other = write_deepspeed(tmp_path, 3, "bf16")
    again = run([*python(), *options(small_world, halved, other), "--num_optim_steps", "9", "--train_batch_size", "8"])
    assert again.returncode == 0, again.stderr
    assert "step-00000007 into DeepSpeed's universal format, once" in again.stdout
    assert len(train_losses(halved)) == 9


def test_a_mistake_under_the_launcher_is_one_message_and_exit_code_2(small_world: SmallWorld, tmp_path: Path) -> None:
    result = run(
        deepspeed(2)
        + options(small_world, tmp_path / "out", write_deepspeed(tmp_path, 1, "bf16"), "--max_seq_length", "500")
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("error: --max_seq_length 500 is more than the 128 positions of model") == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert not (tmp_path / "out").exists()


def test_fp16_without_a_device_for_it_names_the_ways_out(small_world: SmallWorld, tmp_path: Path) -> None:
    argv = options(small_world, tmp_path / "out", write_deepspeed(tmp_path, 1, "fp16"))
    result = run(python() + argv)
    assert result.returncode == 2
    assert (
        "fp16 is on, but this device (cpu) can't compute in it. Ways out: --deepspeed_config ds_configs/cpu_bf16.json"
        in result.stderr
    )


def test_bf16_that_a_gpu_only_emulates_is_refused_with_the_way_out(small_world: SmallWorld, tmp_path: Path) -> None:
    argv = options(small_world, tmp_path / "out", write_deepspeed(tmp_path, 1, "bf16"))
    result = run(python(TRAIN_ON_OLD_GPU) + argv)
    assert result.returncode == 2, result.stderr
    assert (
        "error: bf16 needs compute capability 8.0, and the GPU of rank 0 (Tesla V100) has 7.0: take a fp16 "
        "configuration, such as ds_configs/zero1_fp16.json"
    ) in result.stderr
    assert not (tmp_path / "out").exists()

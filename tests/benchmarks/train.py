"""Training speed: the trainer, a bare loop on the same rows, and transformers.Trainer on the same data and model.

    python -m tests.benchmarks.train --tsv ../shared/data/reddit_t1000.tsv --peer ../shared/bench/peer_hf_trainer.py

Each is a process of its own, in turn, several times; medians are printed. Real tokens are those without padding; target
tokens are those that are learned. On a machine with a GPU it takes --precision fp16 or bf16, several --models and
--lengths, and --rows that fill it.

MFU is the share of the machine's peak that the model's arithmetic makes up (Chowdhery et al. 2022, PaLM, appendix B): 6
operations for each weight of the body and 12 * layers * width * row length for attention a real token, and 6 * width *
vocabulary for the head, at target positions alone, where it is computed. The peak is that of a large matrix product in
the same precision, measured in the same run.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""Not from the tests' conftest, which gives each process one thread and no GPU."""
WARMUP = 3
"""Steps that are not timed."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""torch's names."""


@dataclass(frozen=True)
class Figures:
    """What one process gave."""

    real_tokens_per_second: float
    target_tokens_per_second: float | None
    padding: float
    peak_gib: float


def main() -> None:
    """Run the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tsv", required=True, help="conversations in DialoGPT's format")
    parser.add_argument("--peer", help="a script that trains with transformers.Trainer; left out where it is not given")
    parser.add_argument("--models", nargs="+", default=["117M"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128])
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1], help="ZeRO stages of the trainer")
    parser.add_argument("--worker", choices=["bare", "peak"], help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    parser.add_argument(
        "--options", nargs="*", default=[], help="more options of the trainer, without their dashes: torch_compile=True"
    )
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or usual_precision()
    if arguments.worker == "bare":
        print(json.dumps(bare_loop(arguments)))
    elif arguments.worker == "peak":
        print(json.dumps(matmul_peak(arguments.precision)))
    else:
        compare(arguments)


def usual_precision() -> str:
    """bf16 where it is fast, else fp16 on a GPU and fp32 on a CPU."""
    from dialogpt_ds.hardware import bf16_is_fast

    if bf16_is_fast():
        return "bf16"
    return "fp16" if usual_device() == "cuda" else "fp32"


def compare(arguments: argparse.Namespace) -> None:
    """Run all processes in turn and print a table for each model and length."""
    with tempfile.TemporaryDirectory() as folder:
        for length in arguments.lengths:
            shards = Path(folder, f"shards{length}")
            make_shards(arguments.tsv, shards, length)
            for model in arguments.models:
                table(arguments, model, length, shards, Path(folder))


def make_shards(tsv: str, output: Path | str, length: int) -> None:
    """Make shards as the command does it."""
    command = [sys.executable, str(ROOT / "preprocess" / "make_shards.py"), "--input", tsv, "--output", str(output)]
    subprocess.run([*command, "--max_seq_length", str(length)], check=True, stdout=subprocess.DEVNULL, timeout=600)


def table(arguments: argparse.Namespace, model: str, length: int, shards: Path, folder: Path) -> None:
    """Print one table."""
    found: dict[str, list[Figures]] = {}
    peaks = []
    for number in range(arguments.rounds):
        peaks.append(json.loads(worker("peak", arguments, model, length, shards)[0]))
        for stage in arguments.stages:
            output = folder / f"{model}-{length}-{number}-{stage}"
            found.setdefault(f"trainer, ZeRO-{stage}", []).append(
                trainer(arguments, model, length, shards, output, stage)
            )
        output, peak = worker("bare", arguments, model, length, shards)
        found.setdefault("bare loop", []).append(Figures(**({"peak_gib": peak} | json.loads(output))))
        if arguments.peer:
            found.setdefault("transformers.Trainer", []).append(peer(arguments, model, length))
    peak_flops = statistics.median(peaks)
    print(
        "\n"
        f"{model}, rows of {length}, {arguments.rows} rows a step, {arguments.precision}, {arguments.rounds} x "
        f"{arguments.steps} steps; matmul peak {peak_flops / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':<22} {'real tokens/s':>14} {'targets/s':>10} {'padding':>8} {'MFU':>6} {'peak GiB':>9}")
    medians = {}
    for name, several in found.items():
        medians[name] = statistics.median(f.real_tokens_per_second for f in several)
        targets = [f.target_tokens_per_second for f in several if f.target_tokens_per_second is not None]
        per_target = statistics.median(targets) if targets else None
        mfu = "" if per_target is None else f"{flops(model, length, medians[name], per_target) / peak_flops:.1%}"
        print(
            f"{name:<22} {medians[name]:>14,.1f} {'' if per_target is None else f'{per_target:,.1f}':>10} "
            f"{statistics.median(f.padding for f in several):>8.1%} {mfu:>6} "
            f"{statistics.median(f.peak_gib for f in several):>9.2f}"
        )
    for mine in (name for name in found if name.startswith("trainer")):
        for other in (name for name in found if not name.startswith("trainer")):
            pairs = zip(found[mine], found[other], strict=True)
            ratios = [a.real_tokens_per_second / b.real_tokens_per_second for a, b in pairs]
            print(
                f"{mine} / {other}: {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
            )


def flops(model: str, length: int, tokens: float, targets: float) -> float:
    """Return the operations in `tokens` real tokens and `targets` targets; see the head of this file."""
    from dialogpt_ds.model.flops import Flops
    from dialogpt_ds.model.presets import PRESETS, VOCABULARY

    shape = PRESETS[model]
    body = shape.layers * (12 * shape.width**2 + 13 * shape.width) + 2 * shape.width
    return Flops(body, shape.width * VOCABULARY, shape.layers, shape.width).per_step(tokens, targets, length)


def run_measured(command: list[str]) -> tuple[str, float]:
    """Run a command to its end; returns what it printed and its peak resident memory in GiB."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {
        "WANDB_MODE": "disabled"
    }
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, text=True, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        assert process.returncode == 0, f"{command}\n{errors.read()[-3_000:]}"
        output.seek(0)
        return output.read(), usage.ru_maxrss / 2**20


def worker(name: str, arguments: argparse.Namespace, model: str, length: int, shards: Path) -> tuple[str, float]:
    """Run one of this file's own processes; returns its last line and its peak memory."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.train",
        "--tsv",
        arguments.tsv,
        "--worker",
        name,
        "--models",
        model,
    ]
    command += [
        "--lengths",
        str(length),
        "--shards",
        str(shards),
        "--rows",
        str(arguments.rows),
        "--steps",
        str(arguments.steps),
    ]
    output, peak = run_measured([*command, "--precision", arguments.precision])
    return output.strip().splitlines()[-1], peak


def trainer(arguments: argparse.Namespace, model: str, length: int, shards: Path, output: Path, stage: int) -> Figures:
    """Run launch/train.py as a user does, and read its metrics."""
    config = output.with_suffix(".json")
    half = {name: {"enabled": arguments.precision == name} for name in ("fp16", "bf16")}
    zero = {
        "stage": stage,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }  # as ds_configs/cpu_*.json
    config.write_text(json.dumps(half | {"zero_optimization": zero, "gradient_clipping": 1.0}))
    options = [
        word for option in arguments.options for word in (f"--{option.partition('=')[0]}", option.partition("=")[2])
    ]
    run_measured(
        [
            sys.executable, str(ROOT / "launch" / "train.py"), "--model", model, "--train_input_file", str(shards),
            "--skip_eval", "--deepspeed_config", str(config), "--train_batch_size", str(arguments.rows),
            "--gradient_accumulation_steps", "1", "--num_optim_steps", str(WARMUP + arguments.steps), "--valid_step",
            "1000", "--output_dir", str(output), "--pbar", "False", "--lr_schedule", "None", "--wandb_mode", "disabled",
            *options,
        ]
    )  # fmt: skip
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds_per_step" in line][WARMUP:]
    seconds = sum(step["seconds_per_step"] for step in steps)
    return Figures(
        sum(step["tokens_per_second"] * step["seconds_per_step"] for step in steps) / seconds,
        sum(step["target_tokens_per_second"] * step["seconds_per_step"] for step in steps) / seconds,
        statistics.mean(step["padding_share"] for step in steps),
        steps[-1]["peak_memory_gib"],
    )


def peer(arguments: argparse.Namespace, model: str, length: int) -> Figures:
    """Run the peer in the same precision, on batches of as many rows."""
    from dialogpt_ds.model.presets import PRESETS

    assert PRESETS[model].width == PRESETS["117M"].width, "the peer's model is as wide as 117M"
    precision = {"bf16": arguments.precision == "bf16", "fp16": arguments.precision == "fp16"}
    script = (
        "import runpy, sys, transformers\n"
        "whole = transformers.TrainingArguments\n"
        f"transformers.TrainingArguments = lambda **named: whole(**(named | {precision!r}))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", script, arguments.peer, "--tsv", arguments.tsv, "--steps", str(arguments.steps)]
    command += ["--warmup", str(WARMUP), "--batch", str(arguments.rows), "--max_len", str(length)]
    output, peak = run_measured([*command, "--layers", str(PRESETS[model].layers)])
    said = json.loads(output.strip().splitlines()[-1])
    # Of a GPU's memory the peer says nothing.
    return Figures(
        said["real_tokens_per_second"], None, said["padding_share"], math.nan if usual_device() == "cuda" else peak
    )


@dataclass(frozen=True)
class Ground:
    """What a measurement in this process stands on."""

    device: str
    dtype: Any
    stream: Any
    """Rows, as the trainer takes them."""
    eos: int
    model: Any
    """In fp32 on the CPU."""


def prepare(shards: str, model: str, length: int, precision: str) -> Ground:
    """Open shards and build a model with random weights."""
    import torch

    from dialogpt_ds.distributed.world import World, prepare_cpu
    from dialogpt_ds.model.load import build_model, find_model
    from dialogpt_ds.order.mixture import Mixture, MixtureKey
    from dialogpt_ds.order.position import OrderKey
    from dialogpt_ds.shards.reader import ShardDirectory

    prepare_cpu(World(0, 1, 0))
    torch.manual_seed(0)
    directory = ShardDirectory.open(shards, "--shards")
    key = OrderKey(directory.manifest.fingerprint, 42, length, 64, True)
    eos = directory.manifest.eos_id
    return Ground(
        usual_device(),
        getattr(torch, DTYPES[precision]),
        Mixture([directory], MixtureKey((key,), (1,)), [()]),
        eos,
        build_model(find_model(model, 0.0, eos, directory.manifest.vocab_size), None).train(),
    )


def usual_device() -> str:
    """Return where this machine computes."""
    from dialogpt_ds.hardware import device_of_run

    return device_of_run()


def bare_loop(arguments: argparse.Namespace) -> dict[str, float]:
    """Train on the same rows with nothing around the arithmetic: forward, backward, clip, fused AdamW on fp32 master
    weights."""
    import torch

    from dialogpt_ds.model.loss import TargetLoss, to_tensors
    from dialogpt_ds.order.batches import RankSlice, rank_step
    from dialogpt_ds.order.mixture import MixturePosition

    length = arguments.lengths[0]
    ground = prepare(arguments.shards, arguments.models[0], length, arguments.precision)
    device, dtype, stream, eos, model = ground.device, ground.dtype, ground.stream, ground.eos, ground.model
    position = MixturePosition.start()
    loss_of = TargetLoss(model).to(device)
    masters = (
        [parameter.detach().clone() for parameter in model.parameters()]
        if dtype != torch.float32
        else list(model.parameters())
    )
    loss_of.to(dtype)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=1e-5, weight_decay=0.01, fused=True)
    tokens = targets = rows = 0
    started = 0.0
    for number in range(WARMUP + arguments.steps):
        if number == WARMUP:
            synchronize(device)
            started, tokens, targets, rows = time.perf_counter(), 0, 0, 0
        batch = stream.batch(position, arguments.rows)
        position = batch.position_after
        step = rank_step(batch, RankSlice(0, 1, arguments.rows, 1), length, eos)
        weighted = loss_of(**to_tensors(step.micro_batches[0], device)).weighted
        (weighted / step.weight_sum).backward()
        if masters[0] is not weights[0]:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if masters[0] is not weights[0]:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        weighted.item()
        tokens, targets, rows = tokens + step.num_tokens, targets + step.num_targets, rows + step.num_rows
    synchronize(device)
    seconds = time.perf_counter() - started
    return {
        "real_tokens_per_second": tokens / seconds,
        "target_tokens_per_second": targets / seconds,
        "padding": 1 - tokens / (rows * length),
    } | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {})


def matmul_peak(precision: str) -> float:
    """Return the operations per second of a product of large matrices: the best of several."""
    import torch

    device, dtype = usual_device(), getattr(torch, DTYPES[precision])
    size, repeats = (8_192, 20) if device == "cuda" else (2_048, 4)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
        best = max(best, 2 * size**3 * repeats / (time.perf_counter() - started))
    return best


def synchronize(device: str) -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

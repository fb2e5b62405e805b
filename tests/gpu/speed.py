"""Tokens a second of the trainer's steps, and what each of its improvements is worth: each is switched off in turn.

python -m tests.gpu.speed MODEL ROWS            rows of 512 in bf16 with ZeRO-1, as ds_configs/zero1_bf16.json has it
python -m tests.gpu.speed compiled SECONDS      the same of all models with --torch_compile, as far as the time goes
"""

import functools
import gc
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from tests.gpu.common import DEVICE, ON_GPU, ROOT, LeftOutError, checked, shards, work

MODELS = {"117M": 20, "345M": 10, "762M": 5} if ON_GPU else {"tiny": 2}
"""And rows of a step."""
WARMUP, STEPS, PROFILED = (5, 15, 3) if ON_GPU else (1, 2, 1)
SHOWN = 8
"""Kernels that are named."""


@dataclass(frozen=True)
class Variant:
    """The trainer with something changed."""

    name: str
    options: tuple[str, ...] = ()
    patches: tuple[tuple[str, Any], ...] = ()
    """Names in dialogpt_ds, and what stands there instead."""


def one_column(_: object) -> int:
    return 1


def nothing(*_: object) -> None:
    return None


VARIANTS = (
    Variant("default"),
    Variant("attention_by_mask", ("--attention", "sdpa") if ON_GPU else ("--attention", "eager")),
    Variant("head_not_padded", patches=(("model.loss.columns_of", one_column), ("model.head.columns_of", one_column))),
    Variant("loss_not_compiled", patches=(("training.engine._compile_loss", nothing),)),
    Variant("gelu_not_fused", patches=(("model.load.fuse_activations", nothing),)),
)
COMPILED = Variant("torch_compile", ("--torch_compile",))


def main(words: Sequence[str]) -> None:
    """Measure what the command line asks for."""
    started = time.monotonic()
    from dialogpt_ds.commandline import quiet_libraries
    from dialogpt_ds.distributed.world import World, join_world, leave_world, prepare_cpu, prepare_environment

    world = World(0, 1, 0)
    prepare_environment(world)
    quiet_libraries()
    prepare_cpu(world)
    device = join_world(world)
    try:
        if words[0] == "compiled":
            compiled(device, started + float(words[1]))
        else:
            usual = 0.0
            for variant in VARIANTS:
                with checked(f"speed.{words[0]}.{variant.name}") as details:
                    details |= measured(words[0], int(words[1]), variant, device)
                    usual = usual or details["tokens_per_second"]
                    details["of_default"] = round(details["tokens_per_second"] / usual, 3)
    finally:
        leave_world(None)


def compiled(device: Any, deadline: float) -> None:
    """Measure with --torch_compile; a model for which the time does not suffice is left out."""
    for name, rows in MODELS.items():
        with checked(f"speed.{name}.{COMPILED.name}") as details, alarm(deadline - 5):
            details |= measured(name, rows, COMPILED, device)


@contextmanager
def alarm(deadline: float) -> Iterator[None]:
    """Raise LeftOutError when the time has come."""

    def ring(*_: object) -> None:
        raise LeftOutError("there is no time left for compiling it")

    left = deadline - time.monotonic()
    if left < 10:
        ring()
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(math.ceil(left))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measured(name: str, rows: int, variant: Variant, device: Any) -> dict[str, Any]:
    """Train some steps, the first of them not counted; returns medians and sums over the others."""
    import torch

    from dialogpt_ds.model.flops import flops_of
    from dialogpt_ds.order.mixture import MixturePosition
    from dialogpt_ds.training.data import TrainingData
    from dialogpt_ds.training.engine import start_engine
    from dialogpt_ds.training.rank_report import RankReport
    from dialogpt_ds.training.step import train_step

    settings = settings_of(name, rows, variant)
    engine = data = None
    with ExitStack() as stack:
        # That these hold for GPT-2 is what other tests say; asking a large model in fp32 takes seconds.
        answers = (("model.loss.head_is_linear", lambda _: True), ("model.attention._is_right", lambda *_: True))
        for place, instead in (*answers, *variant.patches):
            stack.enter_context(patch(f"dialogpt_ds.{place}", instead))
        try:
            model = model_on_device(settings)
            flops = flops_of(model)
            engine = start_engine(settings, model)
            data = TrainingData(settings, MixturePosition.start(), device)

            def step() -> tuple[float, Any, Any]:
                started = time.perf_counter()
                rows, _ = data.next_step()
                result = train_step(engine, rows, device, False, lambda: RankReport(rows_failed=data.look_ahead()))
                data.nobody_failed()
                return time.perf_counter() - started, rows, result

            for _ in range(WARMUP):
                step()
            took = [step() for _ in range(STEPS)]
            memory = memory_of(device)
            trace = traced(step)
        finally:
            if data is not None:
                data.close()
            if engine is not None:
                engine.destroy()
            model = engine = data = None
            gc.collect()
            if ON_GPU:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    seconds = sum(one[0] for one in took)
    tokens, targets = (sum(getattr(one[1], f"num_{what}") for one in took) for what in ("tokens", "targets"))
    losses = [one[2].loss for one in took]
    assert all(map(math.isfinite, losses)), losses
    operations = flops.per_step(tokens, targets, settings.row_length)
    return {
        "tokens_per_second": round(tokens / seconds),
        "mfu": round(operations / seconds / peak(device), 4),
        "step_ms": round(statistics.median(one[0] for one in took) * 1e3, 2),
        "slowest_ms": round(max(one[0] for one in took) * 1e3, 2),
        "parts_ms": {
            part: round(statistics.median(one[2].seconds[part] for one in took) * 1e3, 2) for part in took[0][2].seconds
        },
        "loss": losses[-1],
        **memory,
        **trace,
    }


@functools.cache
def peak(device: Any) -> float:
    """Return the operations per second of the device in bf16."""
    from dialogpt_ds.model.flops import device_peak

    return device_peak(device, "bf16").operations_per_second


def settings_of(name: str, rows: int, variant: Variant) -> Any:
    """Return the settings of a run."""
    from dialogpt_ds.commandline import parse
    from dialogpt_ds.config.arguments import TrainingArguments
    from dialogpt_ds.distributed.world import World
    from dialogpt_ds.training.settings import prepare

    argv = [
        "--model", name, "--train_input_file", str(shards("long")), "--skip_eval", "--output_dir",
        str(work() / "speed"), "--deepspeed_config", str(ROOT / "ds_configs" / "zero1_bf16.json"), "--train_batch_size",
        str(rows), "--gradient_accumulation_steps", "1", "--lr_schedule", "None", "--wandb_mode", "disabled",
        *variant.options,
    ]  # fmt: skip
    return prepare(parse(TrainingArguments, "speed", argv), World(0, 1, 0))


def model_on_device(settings: Any) -> Any:
    """Return the model with its first weights, drawn on the GPU: on a CPU that takes seconds for a large one."""
    import torch

    from dialogpt_ds.training.engine import model_of

    torch.manual_seed(0)
    with patch("dialogpt_ds.training.engine.check_model", nothing), torch.device(DEVICE):
        return model_of(settings)


def memory_of(device: Any) -> dict[str, float]:
    """Return the most memory that the GPU was asked for, and that PyTorch took of it, GiB."""
    import torch

    if not ON_GPU:
        return {}
    most, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    retries = torch.cuda.memory_stats(device)["num_alloc_retries"]
    return {"peak_gib": round(most / 2**30, 3), "reserved_gib": round(reserved / 2**30, 3), "alloc_retries": retries}


def traced(step: Callable[[], Any]) -> dict[str, Any]:
    """Return the kernels of a step, the share of the time in which the GPU did nothing, and which kernels took the
    most."""
    import torch

    if not ON_GPU:
        for _ in range(PROFILED):
            step()
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in on_gpu)
    busy, end, by_name = 0.0, -math.inf, dict.fromkeys({name for *_, name in spans}, 0.0)
    for begin, until, name in spans:
        busy += max(until - max(begin, end), 0.0)
        end = max(end, until)
        by_name[name] += until - begin
    whole, together = end - spans[0][0], sum(by_name.values())
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:SHOWN]
    return {
        "kernels_a_step": round(len(spans) / PROFILED),
        "idle_share": round(1 - busy / whole, 4),
        "largest_kernels": {name[:70]: round(took / together, 3) for name, took in largest},
    }


if __name__ == "__main__":
    main(sys.argv[1:])

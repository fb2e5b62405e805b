"""What tests run on the ranks of a pool."""

import json
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.commandline import parse
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.distributed.world import World
from dialogpt_ds.model.load import build_model
from dialogpt_ds.model.loss import to_tensors
from dialogpt_ds.model.saved_bytes import activations_measured
from dialogpt_ds.order.batches import rank_step
from dialogpt_ds.order.mixture import Mixture, MixturePosition
from dialogpt_ds.order.stream import RowStream
from dialogpt_ds.training.engine import start_engine
from dialogpt_ds.training.evaluation import evaluate
from dialogpt_ds.training.settings import Settings, prepare
from dialogpt_ds.training.step import train_step


def settings_of(world: World, argv: list[str]) -> Settings:
    """Return the settings of a command line."""
    return prepare(parse(TrainingArguments, "test", argv), world)


def write_deepspeed(folder: Path, stage: int, precision: str, **more: Any) -> str:
    """Write a DeepSpeed JSON and return its path."""
    # DeepSpeed's default buckets take a gigabyte of address space, which a pool's rank keeps of every engine until it
    # can't fork any more.
    buckets = {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
    config: dict[str, Any] = {"zero_optimization": {"stage": stage} | buckets, "gradient_clipping": 1.0} | more
    for name in ("fp16", "bf16"):
        config[name] = {"enabled": name == precision} | config.get(name, {})
    path = folder / f"zero{stage}_{precision}.json"
    path.write_text(json.dumps(config))
    return str(path)


def engine_of(settings: Settings) -> Any:
    """Build the model and the engine as a run does."""
    torch.manual_seed(settings.arguments.seed)
    return start_engine(settings, build_model(settings.model, None))


def mixture_of(settings: Settings) -> Mixture:
    """Return the stream of rows of a run."""
    return Mixture(settings.directories, settings.order_key, [()] * len(settings.directories))


def losses(world: World, argv: list[str], steps: int) -> list[float]:
    """Train some steps and return their losses."""
    settings = settings_of(world, argv)
    engine = engine_of(settings)
    stream, position, found = mixture_of(settings), MixturePosition.start(len(settings.directories)), []
    for _ in range(steps):
        batch = stream.batch(position, settings.share.global_rows)
        position = batch.position_after
        step = rank_step(batch, settings.share, settings.row_length, settings.train.manifest.eos_id)
        found.append(train_step(engine, step, torch.device("cpu"), turn_ids=False).loss)
    engine.destroy()
    return found


def turn_losses(world: World, argv: list[str]) -> dict[str, float]:
    """Train the first step and return its losses by turn."""
    settings = settings_of(world, argv)
    engine = engine_of(settings)
    batch = mixture_of(settings).batch(MixturePosition.start(len(settings.directories)), settings.share.global_rows)
    step = rank_step(batch, settings.share, settings.row_length, settings.train.manifest.eos_id)
    found = train_step(engine, step, torch.device("cpu"), turn_ids=False).turn_losses
    engine.destroy()
    return found


def losses_in_fp16(world: World, argv: list[str], steps: int) -> list[float]:
    """Like `losses`, on a CPU that is said to compute in fp16: DeepSpeed's own fp16 optimizers and loss scaler run."""
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    honest = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda self: True
    try:
        return losses(world, argv, steps)
    finally:
        accelerator.is_fp16_supported = honest


def loss_and_gradients(world: World, argv: list[str]) -> tuple[float, dict[str, torch.Tensor]]:
    """Run the first optimizer step up to its gradients; returns its loss and the gradients by parameter."""
    from deepspeed.utils import safe_get_full_grad

    settings = settings_of(world, argv)
    engine = engine_of(settings)
    batch = mixture_of(settings).batch(MixturePosition.start(len(settings.directories)), settings.share.global_rows)
    step = rank_step(batch, settings.share, settings.row_length, settings.train.manifest.eos_id)
    gradients: dict[str, torch.Tensor] = {}
    update = engine.step

    def look_before_the_update() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.model.named_parameters():
                gradients[name] = safe_get_full_grad(parameter).clone()
        update()

    engine.step = look_before_the_update
    loss = train_step(engine, step, torch.device("cpu"), turn_ids=False).loss
    del engine.step
    engine.destroy()
    return loss, gradients if world.is_first else {}


def activation_bytes(world: World, argv: list[str]) -> int:
    """Return what the forward pass of the first micro-batch keeps for the backward pass."""
    settings = settings_of(world, argv)
    engine = engine_of(settings)
    batch = mixture_of(settings).batch(MixturePosition.start(len(settings.directories)), settings.share.global_rows)
    step = rank_step(batch, settings.share, settings.row_length, settings.train.manifest.eos_id)
    with activations_measured(engine.module) as saved:
        engine.module(**to_tensors(step.micro_batches[0], "cpu"))
    engine.destroy()
    return saved.total


def evaluation(world: World, argv: list[str]) -> tuple[float, int]:
    """Evaluate the untrained model; returns mean loss and number of targets."""
    settings = settings_of(world, argv)
    engine = engine_of(settings)
    assert settings.evaluation is not None
    stream = RowStream(settings.evaluation, settings.evaluation_key(settings.evaluation))
    result = evaluate(
        engine,
        stream,
        world,
        settings.arguments.valid_batch_size,
        settings.train.manifest.eos_id,
        torch.device("cpu"),
        False,
    )
    engine.destroy()
    return result.loss, result.num_targets

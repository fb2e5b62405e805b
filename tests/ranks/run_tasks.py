"""Whole runs on the ranks of a pool: what launch/train.py does between the ranks' coming together and their parting."""

import gc
import json
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds.distributed.hang_watch import HangWatch
from dialogpt_ds.distributed.stop_requests import StopRequests
from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.files import sha256_of_file
from dialogpt_ds.model.load import build_model
from dialogpt_ds.training.loop import TrainingRun
from dialogpt_ds.training.resume import preview_resume
from tests.ranks.rank_tasks import settings_of


def whole_run(world: World, argv: list[str], fp16: bool = False) -> dict[str, Any]:
    """Run to the end; returns the exit code, or the error, and the optimizer's state at the end by parameter.

    Args:
        world: this rank's.
        argv: the command line; wandb is left out.
        fp16: say that this CPU computes in fp16.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    honest = accelerator.is_fp16_supported
    if fp16:
        accelerator.is_fp16_supported = lambda self: True
    run = None
    try:
        settings = settings_of(world, [*argv, "--wandb_mode", "disabled", "--pbar", "False"])
        preview_resume(settings)
        torch.manual_seed(settings.arguments.seed)
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        requests = StopRequests(settings.output_dir, world.is_first)
        watch = HangWatch(settings.output_dir, world.rank, 0)
        run = TrainingRun(settings, requests, watch, build_model(settings.model, None), torch.device("cpu"))
        code = run.run()
        run.close(code)
        return {"code": code, "notes": run.notes} | facts_of(run)
    except (UserError, RunError) as error:
        return {"code": str(error)}
    finally:
        accelerator.is_fp16_supported = honest
        if run is not None:
            run.engine.destroy()
            run = None
            gc.collect()  # an engine of stage 1 or 2 keeps a buffer of a gigabyte, in cycles of references


def facts_of(run: TrainingRun) -> dict[str, Any]:
    """Return what must survive a resume beside the weights."""
    from dialogpt_ds.checkpoints.load import updates_made

    groups = [
        {
            key: value
            for key, value in group.items()
            if key not in ("params", "step") and not isinstance(value, torch.Tensor)
        }
        for group in run.engine.optimizer.param_groups
    ]
    return {
        "groups": groups,
        "updates": updates_made(run.engine),
        "applied": run.engine.lr_scheduler.last_epoch,
        "skipped": run.engine.skipped_steps,
    }


def losses_of(output: Path) -> list[float]:
    """Return the losses of a run's steps."""
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [m["loss"] for m in metrics if "loss" in m]


def weights_of(output: Path) -> str:
    """Return the SHA-256 of the exported weights."""
    return sha256_of_file(output / "model" / "model.safetensors")

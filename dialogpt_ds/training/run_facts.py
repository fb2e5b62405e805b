"""What is known of a run beside its metrics: configuration, code, data and machines, without secrets."""

import platform
import socket
from typing import Any

import torch

from dialogpt_ds import __version__
from dialogpt_ds.hardware import device_of_run
from dialogpt_ds.model.flops import Peak
from dialogpt_ds.redaction import without_secrets
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.versions import git_revision, versions


def run_facts(settings: Settings, num_parameters: int, peak: Peak) -> dict[str, Any]:
    """Return the configuration that wandb shows: every argument, DeepSpeed's configuration, revision, data sets and machine."""
    facts = settings.what_runs() | {
        "deepspeed": settings.deepspeed,
        "precision": settings.precision,
        "zero_stage": settings.zero_stage,
        "num_parameters": num_parameters,
        "rows_per_step": settings.batch.train,
        "train_data": [
            data_facts(directory) | {"weight": source.weight}
            for source, directory in zip(settings.sources, settings.directories, strict=True)
        ],
        "eval_data": None if settings.evaluation is None else data_facts(settings.evaluation),
        "revision": git_revision(),
        "machine": machine_facts(settings) | {"peak": str(peak)},
    }
    return without_secrets(facts)


def data_facts(directory: ShardDirectory) -> dict[str, Any]:
    """Return a data set's manifest and report, but for what grows with it: the list of shards and the histograms."""
    manifest = directory.manifest
    content = {name: value for name, value in manifest.content().items() if name != "shardlist"}
    report = directory.report()
    return {
        "name": directory.name,
        "manifest": content | {"fingerprint": manifest.fingerprint},
        "report": report and {name: value for name, value in report.items() if name != "histograms"},
    }


def machine_facts(settings: Settings) -> dict[str, Any]:
    """Return where the run is at work, as rank 0 sees it."""
    installed = versions()
    python = installed.pop("python")
    return {
        "processes": settings.world.size,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if device_of_run() == "cuda" else f"cpu ({platform.machine()})",
        "python": python,
        "dialogpt_ds": __version__,
        "packages": installed,
    }

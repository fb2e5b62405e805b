"""What a person reads of a run besides its metrics: the table at its start, the summary at its end, the facts for wandb
and cards."""

import platform
import socket
import time
from pathlib import Path
from typing import Any

import torch

from dialogpt_ds import __version__
from dialogpt_ds.config.configuration import BUILT_IN
from dialogpt_ds.hardware import device_of_run
from dialogpt_ds.logs.progress import clock
from dialogpt_ds.logs.text_logs import METRICS_FILE, REPLIES, TRAIN_LOG
from dialogpt_ds.model.flops import DevicePeak
from dialogpt_ds.redaction import without_secrets
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.settings import Settings
from dialogpt_ds.training.state import ProgressState, perplexity
from dialogpt_ds.versions import git_revision, versions

ATTENTION = {
    "varlen": "varlen, PyTorch's FlashAttention over the examples of packed rows",
    "sdpa": "sdpa, PyTorch's, with a mask around each example",
    "eager": "eager, transformers' own, with a mask around each example",
}
"""What is said of an implementation of attention."""


def start_table(
    settings: Settings,
    num_parameters: int,
    attention: str,
    wandb_mode: str,
    resumed_step: int,
    device_peak: DevicePeak | None = None,
) -> str:
    """Return the table: model, data, batch arithmetic, schedule peak, precision, attention, ZeRO, output."""
    arguments, batch = settings.arguments, settings.batch
    best_rate, at = settings.schedule.peak()
    step_tokens = batch.train * settings.row_length
    all_tokens = sum(directory.manifest.totals["tokens"] for directory in settings.directories)
    rows: list[tuple[str, Any]] = [
        ("model", f"{settings.model.name}, {_millions(num_parameters)} parameters, dropout {arguments.dropout}"),
        *_data(settings, step_tokens),
        ("evaluation", "none" if settings.evaluation is None else
         f"{settings.evaluation.name}: {settings.evaluation.manifest.totals['target_tokens']:,} targets, "
         f"every {arguments.valid_step:,} steps; replies to {len(settings.sample_prompts)} prompts"),
        ("batch", f"{batch.micro} rows * {batch.accumulation} micro-batches * {batch.world_size} processes = "
                  f"{batch.train} rows "
                  f"of {settings.row_length} = {step_tokens:,} tokens a step"),
        ("epoch", f"about {max(round(all_tokens / step_tokens), 1):,} steps"),
        ("schedule", f"{arguments.lr_schedule}, peak rate {best_rate:.3e} at step {at:,}, "
                     f"{arguments.num_optim_steps:,} steps in all"),
        ("precision", settings.precision + (f"; MFU is against {device_peak} of a process" if device_peak else "")),
        ("attention", ATTENTION.get(attention, attention)),
        ("DeepSpeed", f"ZeRO-{settings.zero_stage}, {arguments.deepspeed_config or BUILT_IN}"
                      + "".join(f"; {note}" for note in settings.notes)),
        ("output", f"{settings.output_dir}, a checkpoint every {settings.save_step:,} steps"),
        ("wandb", wandb_mode),
    ]  # fmt: skip
    if resumed_step:
        rows.append(("resumed", f"from step {resumed_step:,}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {without_secrets(value)}" for name, value in rows)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _data(settings: Settings, step_tokens: int) -> list[tuple[str, str]]:
    """Return a line for each shard directory; of a mixture with its share of the rows and how long it lasts."""
    lines: list[tuple[str, str]] = []
    shares = sum(source.weight for source in settings.sources)
    for source, directory in zip(settings.sources, settings.directories, strict=True):
        totals = directory.manifest.totals
        text = (
            f"{directory.name}: {totals['examples']:,} examples, {totals['tokens']:,} tokens, "
            f"{totals['target_tokens']:,} of them targets"
        )
        if len(settings.sources) > 1:
            steps = max(round(totals["tokens"] * shares / (source.weight * step_tokens)), 1)
            text += f"; {source.weight} of {shares} rows, all seen after about {steps:,} steps"
        lines.append(("train data" if not lines else "", text))
    return lines


class RunClock:
    """How much this process has done since it started."""

    def __init__(self, state: ProgressState) -> None:
        self._started = time.monotonic()
        self._first_step, self._first_tokens = state.global_step, state.tokens_seen

    def line(self, state: ProgressState) -> str:
        """Return steps, time and speed of this process."""
        seconds = time.monotonic() - self._started
        steps, tokens = state.global_step - self._first_step, state.tokens_seen - self._first_tokens
        speed = tokens / max(seconds, 1e-9)
        return f"{clock(seconds)} for {steps:,} steps: {speed:,.0f} tokens/s, evaluations and saves included"


def end_summary(
    logs: Path,
    has_replies: bool,
    state: ProgressState,
    time_line: str,
    warnings: dict[str, int],
    places: dict[str, Path],
) -> str:
    """Return the table.

    Args:
        logs: folder of the text files.
        has_replies: whether sample_replies.txt is among them.
        state: at the run's end.
        time_line: from RunClock.
        warnings: name -> count of what went wrong without ending the run; those of 0 are left out.
        places: model and checkpoint: where they are.
    """
    rows = [
        (
            "done",
            f"{state.global_step:,} steps, {state.tokens_seen:,} tokens ({state.targets_seen:,} targets), "
            f"{state.rows_seen:,} rows",
        ),
        ("time", time_line),
    ]
    if state.best_eval_loss is not None:
        best = perplexity(state.best_eval_loss)
        rows.append(("best", f"loss {state.best_eval_loss:.4f}, perplexity {best:,.2f} at step {state.best_step:,}"))
    found = [f"{count:,} {name}" for name, count in warnings.items() if count]
    if found:
        rows.append(("warnings", ", ".join(found)))
    files = f"{TRAIN_LOG}, {METRICS_FILE}" + (f", {REPLIES}" if has_replies else "")
    rows += [
        *((name, str(path)) for name, path in places.items()),
        ("logs", f"{logs} ({files})"),
        ("curves", f"python launch/plot.py {logs} --output curves.png"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def run_facts(settings: Settings, num_parameters: int, peak: DevicePeak) -> dict[str, Any]:
    """Return the configuration that wandb shows: every argument, DeepSpeed's configuration, revision, data sets and
    machine."""
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
        "machine": machine_facts(settings.world.size) | {"peak": str(peak)},
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


def machine_facts(num_processes: int) -> dict[str, Any]:
    """Return where the run is at work, as rank 0 sees it."""
    installed = versions()
    python = installed.pop("python")
    return {
        "processes": num_processes,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if device_of_run() == "cuda" else f"cpu ({platform.machine()})",
        "python": python,
        "dialogpt_ds": __version__,
        "packages": installed,
    }


def facts_for_a_card(settings: Settings) -> dict[str, Any]:
    """Return what a model card says of the run itself, without secrets."""
    arguments, batch = settings.arguments, settings.batch
    data = [
        {
            "name": without_secrets(directory.name),
            "weight": source.weight,
            "fingerprint": directory.manifest.fingerprint,
        }
        | {name: directory.manifest.totals[name] for name in ("examples", "tokens", "target_tokens")}
        for source, directory in zip(settings.sources, settings.directories, strict=True)
    ]
    evaluation = settings.evaluation and {
        "name": without_secrets(settings.evaluation.name),
        "target_tokens": settings.evaluation.manifest.totals["target_tokens"],
    }
    shown = {
        "rows of a step": f"{batch.train} of {settings.row_length} tokens",
        "schedule": f"{arguments.lr_schedule}, learning rate {arguments.learning_rate:g}, "
        f"{arguments.num_optim_steps:,} steps planned",
        "optimizer": f"{settings.optimizer_type}, weight decay "
        f"{settings.deepspeed['optimizer']['params'].get('weight_decay', 0.0):g}",
        "precision": settings.precision,
        "dropout": arguments.dropout,
        "seed": arguments.seed,
    }
    return {
        "model": settings.model.name,
        "row_length": settings.row_length,
        "data": data,
        "eval_data": evaluation,
        "settings": shown,
    }

"""What a run is, in one table before it starts."""

from typing import Any

from dialogpt_ds.config.schedule import peak
from dialogpt_ds.model.flops import Peak
from dialogpt_ds.redaction import without_secrets
from dialogpt_ds.training.settings import BUILT_IN, Settings

ATTENTION = {
    "varlen": "varlen, PyTorch's FlashAttention over the examples of packed rows",
    "sdpa": "sdpa, PyTorch's, with a mask around each example",
    "eager": "eager, transformers' own, with a mask around each example",
}
"""What is said of an implementation of attention."""


def start_table(
    settings: Settings, num_parameters: int, attention: str, wandb_mode: str, resumed_step: int, device_peak: Peak | None = None
) -> str:
    """Return the table: model, data, batch arithmetic, schedule peak, precision, attention, ZeRO, output."""
    arguments, batch = settings.arguments, settings.batch
    best_rate, at = peak(arguments.lr_schedule, **settings.schedule_settings())
    step_tokens = batch.train * settings.row_length
    all_tokens = sum(directory.manifest.totals["tokens"] for directory in settings.directories)
    rows: list[tuple[str, Any]] = [
        ("model", f"{settings.model.name}, {_millions(num_parameters)} parameters, dropout {arguments.dropout}"),
        *_data(settings, step_tokens),
        ("evaluation", "none" if settings.evaluation is None else
         f"{settings.evaluation.name}: {settings.evaluation.manifest.totals['target_tokens']:,} targets, "
         f"every {arguments.valid_step:,} steps; replies to {len(settings.sample_prompts)} prompts"),
        ("batch", f"{batch.micro} rows * {batch.accumulation} micro-batches * {batch.world_size} processes = {batch.train} rows "
                  f"of {settings.row_length} = {step_tokens:,} tokens a step"),
        ("epoch", f"about {max(round(all_tokens / step_tokens), 1):,} steps"),
        ("schedule", f"{arguments.lr_schedule}, peak rate {best_rate:.3e} at step {at:,}, {arguments.num_optim_steps:,} steps in all"),
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

"""What a run is, in one table before it starts."""

from typing import Any

from dialogpt_ds.training.schedule import peak
from dialogpt_ds.training.settings import BUILT_IN, Settings


def start_table(settings: Settings, num_parameters: int, wandb_mode: str, resumed_step: int) -> str:
    """Return the table: model, data, batch arithmetic, schedule peak, precision, ZeRO, output."""
    arguments, batch = settings.arguments, settings.batch
    best_rate, at = peak(arguments.lr_schedule, **settings.schedule_settings())
    totals = settings.train.manifest.totals
    step_tokens = batch.train * settings.row_length
    rows: list[tuple[str, Any]] = [
        ("model", f"{settings.model.name}, {num_parameters / 1e6:,.1f} M parameters, dropout {arguments.dropout}"),
        ("train data", f"{settings.train.folder}: {totals['examples']:,} examples, {totals['tokens']:,} tokens, "
                       f"{totals['target_tokens']:,} of them targets"),
        ("evaluation", "none" if settings.evaluation is None else
         f"{settings.evaluation.folder}: {settings.evaluation.manifest.totals['target_tokens']:,} targets, "
         f"every {arguments.valid_step:,} steps"),
        ("batch", f"{batch.micro} rows * {batch.accumulation} micro-batches * {batch.world_size} processes = {batch.train} rows "
                  f"of {settings.row_length} = {step_tokens:,} tokens a step"),
        ("epoch", f"about {max(round(totals['tokens'] / step_tokens), 1):,} steps"),
        ("schedule", f"{arguments.lr_schedule}, peak rate {best_rate:.3e} at step {at:,}, {arguments.num_optim_steps:,} steps in all"),
        ("precision", settings.precision),
        ("DeepSpeed", f"ZeRO-{settings.zero_stage}, {arguments.deepspeed_config or BUILT_IN}"
                      + "".join(f"; {note}" for note in settings.notes)),
        ("output", f"{settings.output_dir}, a checkpoint every {settings.save_step:,} steps"),
        ("wandb", wandb_mode),
    ]  # fmt: skip
    if resumed_step:
        rows.append(("resumed", f"from step {resumed_step:,}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

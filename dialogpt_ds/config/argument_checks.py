"""What of the training command line can be wrong by itself, without a look at anything else."""

from dataclasses import asdict

from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.redaction import LEFT_OUT

AT_LEAST_ONE = (
    *("train_batch_size", "valid_batch_size", "gradient_accumulation_steps", "num_optim_steps", "valid_step"),
    *("save_step", "sample_max_new_tokens"),
)
AT_LEAST_ZERO = (
    *("loader_workers", "warmup_steps", "keep_checkpoints", "loss_scale", "continue_from", "max_skipped_steps"),
    *("save_minutes", "hang_timeout", "contact_timeout"),
)
ABOVE_ZERO = ("cache_gb", "learning_rate")


def argument_problems(arguments: TrainingArguments) -> list[str]:
    """Return all problems, each with the way out."""
    return [*_numbers(arguments), *_together(arguments), *_secrets(arguments)]


def _numbers(arguments: TrainingArguments) -> list[str]:
    given = {name: value for name, value in asdict(arguments).items() if value is not None}
    # `not (a >= b)`, since nan is neither above nor below.
    problems = [
        f"--{name} {given[name]} must be 1 or more" for name in AT_LEAST_ONE if name in given and not given[name] >= 1
    ]
    problems += [f"--{name} {given[name]} must be 0 or more" for name in AT_LEAST_ZERO if not given[name] >= 0]
    problems += [f"--{name} {given[name]} must be above 0" for name in ABOVE_ZERO if not given[name] > 0]
    if not 0 <= arguments.dropout < 1:
        problems.append(f"--dropout {arguments.dropout} is no probability: give 0 to below 1")
    if not 0 < arguments.warmup_proportion < 1:
        problems.append(f"--warmup_proportion {arguments.warmup_proportion} must lie between 0 and 1")
    return problems


def _together(arguments: TrainingArguments) -> list[str]:
    """Return what is missing, and what does not go together."""
    problems = []
    if arguments.deterministic:
        given = {
            "torch_compile": arguments.torch_compile,
            "attention flash_attention_2": arguments.attention == "flash_attention_2",
        }
        problems += [
            f"--deterministic excludes --{option}, whose kernels may add in another order each time: leave one out"
            for option, is_given in given.items()
            if is_given
        ]
    if not arguments.train_input_file:
        problems.append("--train_input_file is missing: name a shard directory (preprocess/make_shards.py makes one)")
    if (arguments.gpu or arguments.link != "auto") and not (arguments.gpu and arguments.dry_run):
        problems.append(
            "--gpu and --link are for a dry run on GPUs that need not be here: give --dry_run --gpu NAME, or leave "
            "them out"
        )
    if not arguments.eval_input_file and not arguments.skip_eval:
        problems.append("--eval_input_file is missing: name a shard directory, or give --skip_eval")
    return problems


def _secrets(arguments: TrainingArguments) -> list[str]:
    """Return where a configuration was written down without a secret that it had."""
    return [
        f"--{name} {value!r}: a secret was left out when this was written down; give the whole value on the command "
        "line"
        for name, value in asdict(arguments).items()
        if LEFT_OUT in str(value)
    ]

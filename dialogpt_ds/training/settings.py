"""Everything that a run needs to know, checked before anything is started."""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dialogpt_ds.commandline import Parsed
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.config.batch import BatchSizes, resolve_batch
from dialogpt_ds.config.deepspeed_json import check_deepspeed_config, read_deepspeed_json
from dialogpt_ds.config.precision import Precision, fill_optimizer, fill_precision, resolve_precision
from dialogpt_ds.config.sources import NamedSource, parse_sources
from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import UserError
from dialogpt_ds.model.attention import check_attention, set_attention
from dialogpt_ds.model.load import ModelSource, build_model, check_init_checkpoint, find_model
from dialogpt_ds.model.probe import Wants, check_model
from dialogpt_ds.order.batches import Share
from dialogpt_ds.order.mixture import Mixture, MixtureKey
from dialogpt_ds.order.position import OrderKey
from dialogpt_ds.order.windows import BLOCKS_PER_WINDOW
from dialogpt_ds.redaction import LEFT_OUT, without_secrets
from dialogpt_ds.shards.cache import CacheSettings
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.data_checks import (
    check_cache,
    check_model_tokenizer,
    check_row_length,
    check_same_tokenizer,
    check_sources,
    open_evaluation_data,
    tokenizer_of,
)

DEFAULT_CLIPPING = 1.0
BUILT_IN = "built-in ZeRO-1"
BUCKET = 25_000_000
"""Numbers that are reduced at a time, as in ds_configs/, whose README says why; DeepSpeed's own default takes 2 GB for them in fp32."""


@dataclass(frozen=True)
class Settings:
    """A run as it will be: nothing in it is a default any more."""

    arguments: TrainingArguments
    world: World
    deepspeed: dict[str, Any]
    """The final DeepSpeed configuration."""
    notes: list[str]
    """What was filled in, for the start-up table."""
    batch: BatchSizes
    precision: Precision
    learning_rate: float
    """Scale of the schedule, from the command line or the JSON."""
    model: ModelSource
    sources: list[NamedSource]
    """What is trained on, with weights."""
    directories: list[ShardDirectory]
    """The same, opened."""
    evaluation: ShardDirectory | None
    tokenizer: Any
    row_length: int

    @property
    def train(self) -> ShardDirectory:
        """The first shard directory that is trained on; all have its tokenizer."""
        return self.directories[0]

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def optimizer_type(self) -> str:
        """Type of the optimizer, as the JSON names it."""
        return str(self.deepspeed["optimizer"]["type"])

    def layout(self) -> dict[str, Any]:
        """Return what decides on how a checkpoint's state is laid out over processes and files."""
        zero = self.deepspeed.get("zero_optimization", {})
        return {
            "processes": self.world.size,
            "ZeRO stage": self.zero_stage,
            "precision": self.precision,
            "optimizer state on": (zero.get("offload_optimizer") or {}).get("device", "none"),
            "sub_group_size": zero.get("sub_group_size") if self.zero_stage == 3 else None,
            "round_robin_gradients": bool(zero.get("round_robin_gradients")) and self.zero_stage in (1, 2),
        }

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.arguments.output_dir).expanduser()

    @property
    def log_dir(self) -> Path:
        """Folder of the logs."""
        return Path(self.arguments.log_dir).expanduser() if self.arguments.log_dir else self.output_dir

    @property
    def save_step(self) -> int:
        """Optimizer steps between checkpoints."""
        return self.arguments.valid_step if self.arguments.save_step is None else self.arguments.save_step

    @property
    def order_key(self) -> MixtureKey:
        """What the order of rows is a function of."""
        arguments = self.arguments
        keys = [order_key(directory, arguments.seed, self.row_length, arguments.packing) for directory in self.directories]
        return MixtureKey(tuple(keys), tuple(source.weight for source in self.sources))

    def evaluation_key(self, directory: ShardDirectory) -> OrderKey:
        """What the order of the evaluation's rows is a function of: the same in every run, packed where training is."""
        return order_key(directory, 0, self.row_length, self.arguments.packing)

    @property
    def share(self) -> Share:
        """This rank's share of a global batch."""
        return Share(self.world.rank, self.world.size, self.batch.micro, self.batch.accumulation)

    @property
    def sample_prompts(self) -> list[str]:
        """Prompts to answer at every evaluation; none where turn numbers are fed, which no generation here goes on with."""
        return [prompt for prompt in self.arguments.sample_prompts if prompt.strip()] if self.arguments.no_token_id else []

    def schedule_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of schedule.rate and schedule.peak."""
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.arguments.warmup_steps,
            "warmup_proportion": self.arguments.warmup_proportion,
            "num_steps": self.arguments.num_optim_steps,
            "width": self.model.width,
        }

    def facts_for_a_card(self) -> dict[str, Any]:
        """Return what a model card says of the run itself, without secrets."""
        arguments, batch = self.arguments, self.batch
        data = [
            {"name": without_secrets(directory.name), "weight": source.weight, "fingerprint": directory.manifest.fingerprint}
            | {name: directory.manifest.totals[name] for name in ("examples", "tokens", "target_tokens")}
            for source, directory in zip(self.sources, self.directories, strict=True)
        ]
        evaluation = self.evaluation and {
            "name": without_secrets(self.evaluation.name),
            "target_tokens": self.evaluation.manifest.totals["target_tokens"],
        }
        settings = {
            "rows of a step": f"{batch.train} of {self.row_length} tokens",
            "schedule": f"{arguments.lr_schedule}, learning rate {self.learning_rate:g}, {arguments.num_optim_steps:,} steps planned",
            "optimizer": f"{self.optimizer_type}, weight decay {self.deepspeed['optimizer']['params'].get('weight_decay', 0.0):g}",
            "precision": self.precision,
            "dropout": arguments.dropout,
            "seed": arguments.seed,
        }
        return {
            "model": self.model.name,
            "row_length": self.row_length,
            "data": data,
            "eval_data": evaluation,
            "settings": settings,
        }

    def what_runs(self) -> dict[str, Any]:
        """Return the content of run_config.yaml: every argument with the value that holds.

        What belongs to this start of the run alone is left out, so that `--config run_config.yaml` repeats it.
        """
        of_this_start = (
            "resume",
            "continue_from",
            "changed_order",
            "local_rank",
            "print_config",
            "plot_schedule",
            "dry_run",
            "gpu",
            "link",
        )
        return {name: value for name, value in asdict(self.arguments).items() if name not in of_this_start} | {
            "max_seq_length": self.row_length,
            "train_batch_size": self.batch.micro * self.batch.accumulation,
            "gradient_accumulation_steps": self.batch.accumulation,
            "learning_rate": self.learning_rate,
            "fp16": self.precision == "fp16",
            "loss_scale": self.deepspeed.get("fp16", {}).get("loss_scale", self.arguments.loss_scale),
            "save_step": self.save_step,
            "log_dir": str(self.log_dir),
        }


def model_of(settings: Settings) -> Any:
    """Build the model with its first weights, and check that it can be trained as the run wants it; raises UserError."""
    arguments = settings.arguments
    model = build_model(settings.model, arguments.init_checkpoint or None)
    wants = Wants(arguments.packing, not arguments.no_token_id, arguments.activation_checkpointing, arguments.chunked_head)
    check_model(model, settings.model.name, wants)
    set_attention(model, arguments.attention, settings.precision, arguments.dropout)
    return model


def order_key(directory: ShardDirectory, seed: int, row_length: int, packing: bool) -> OrderKey:
    """Return the key of the order of a shard directory's rows."""
    return OrderKey(directory.manifest.fingerprint, seed, row_length, BLOCKS_PER_WINDOW, packing)


def prepare(parsed: Parsed[TrainingArguments], world: World) -> Settings:
    """Check everything and fill in every default.

    Raises:
        UserError: the first kind of problem that was found, with all of its instances.
    """
    arguments = parsed.arguments
    _check_numbers(arguments)
    _check_secrets(arguments)
    deepspeed, notes = deepspeed_config_of(arguments)
    batch = resolve_batch(arguments.train_batch_size, arguments.gradient_accumulation_steps, parsed.explicit, deepspeed, world.size)
    precision = resolve_precision(arguments, parsed.explicit, deepspeed if arguments.deepspeed_config else None)
    fill_precision(deepspeed, precision, arguments, parsed.explicit)
    learning_rate = fill_optimizer(deepspeed, arguments, parsed.explicit)
    deepspeed |= batch.keys()
    sources = parse_sources(arguments.train_input_file, "--train_input_file")
    cache = CacheSettings(Path(arguments.cache_dir).expanduser(), int(arguments.cache_gb * 1e9))
    directories = [ShardDirectory.open(source.path, "--train_input_file", cache) for source in sources]
    check_sources(directories)
    train = directories[0]
    manifest = train.manifest
    longest = max(directory.manifest.max_seq_length for directory in directories)
    row_length = arguments.max_seq_length if "max_seq_length" in parsed.explicit else longest
    evaluation = None if arguments.skip_eval else open_evaluation_data(arguments, train, row_length, cache)
    check_cache([*directories, *([evaluation] if evaluation else [])], cache)
    tokenizer = tokenizer_of(train)
    model = find_model(arguments.model_name_or_path, arguments.dropout, manifest.eos_id, manifest.vocab_size, arguments.attention)
    check_attention(arguments.attention, precision, arguments.dropout)
    if arguments.init_checkpoint:
        check_init_checkpoint(arguments.init_checkpoint, model)
    check_model_tokenizer(model, train)
    if evaluation is not None:
        check_same_tokenizer(evaluation, "--eval_input_file", train)
    check_row_length(row_length, model, directories, evaluation)
    settings = Settings(
        arguments,
        world,
        deepspeed,
        notes,
        batch,
        precision,
        learning_rate,
        model,
        sources,
        directories,
        evaluation,
        tokenizer,
        row_length,
    )
    Mixture(directories, settings.order_key, [()] * len(directories)).check_size(batch.train, "--train_input_file")
    return settings


def _check_secrets(arguments: TrainingArguments) -> None:
    """Refuse a configuration from which a secret was left out; raises UserError."""
    for name, value in asdict(arguments).items():
        if LEFT_OUT in str(value):
            raise UserError(
                f"--{name} {value!r}: a secret was left out when this was written down; give the whole value on the command line"
            )


def _check_numbers(arguments: TrainingArguments) -> None:
    problems = []
    for name in (
        "train_batch_size",
        "valid_batch_size",
        "gradient_accumulation_steps",
        "num_optim_steps",
        "valid_step",
    ):
        if getattr(arguments, name) < 1:
            problems.append(f"--{name} {getattr(arguments, name)} must be 1 or more")
    if arguments.sample_max_new_tokens < 1:
        problems.append(f"--sample_max_new_tokens {arguments.sample_max_new_tokens} must be 1 or more")
    for name in ("loader_workers", "warmup_steps", "keep_checkpoints", "loss_scale", "continue_from", "max_skipped_steps"):
        if getattr(arguments, name) < 0:
            problems.append(f"--{name} {getattr(arguments, name)} must be 0 or more")
    if arguments.save_step is not None and arguments.save_step < 1:
        problems.append(f"--save_step {arguments.save_step} must be 1 or more")
    for name in ("save_minutes", "hang_timeout", "contact_timeout"):
        if not getattr(arguments, name) >= 0:
            problems.append(f"--{name} {getattr(arguments, name)} must be 0 or more")
    if arguments.cache_gb <= 0:
        problems.append(f"--cache_gb {arguments.cache_gb} must be above 0")
    if arguments.learning_rate <= 0:
        problems.append(f"--learning_rate {arguments.learning_rate} must be above 0")
    if not 0 <= arguments.dropout < 1:
        problems.append(f"--dropout {arguments.dropout} is no probability: give 0 to below 1")
    if not 0 < arguments.warmup_proportion < 1:
        problems.append(f"--warmup_proportion {arguments.warmup_proportion} must lie between 0 and 1")
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
            "--gpu and --link are for a dry run on GPUs that need not be here: give --dry_run --gpu NAME, or leave them out"
        )
    if not arguments.eval_input_file and not arguments.skip_eval:
        problems.append("--eval_input_file is missing: name a shard directory, or give --skip_eval")
    if problems:
        raise UserError("\n".join(problems))


def deepspeed_config_of(arguments: TrainingArguments) -> tuple[dict[str, Any], list[str]]:
    """Return the JSON, checked, with what was missing filled in and said."""
    notes = []
    if arguments.deepspeed_config:
        config = copy.deepcopy(read_deepspeed_json(arguments.deepspeed_config))
        check_deepspeed_config(config, arguments.deepspeed_config)
        if "bfloat16" in config:  # the old name of the same block
            config["bf16"] = config.pop("bfloat16")
        if "fp16" not in config and "bf16" not in config:
            notes.append("no precision in it")
    else:
        zero = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        config = {"zero_optimization": zero}
    # It waits for the device twice in every micro-batch; the trainer has clocks of its own, which don't.
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    if config.get("gradient_clipping") is None:
        config["gradient_clipping"] = DEFAULT_CLIPPING
        notes.append(f"gradient_clipping {DEFAULT_CLIPPING} filled in")
    return config, notes

"""Everything that a run needs to know, checked before anything is started."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dialogpt_ds.commandline import Parsed
from dialogpt_ds.config.argument_checks import argument_problems
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.config.batch import BatchSizes, resolve_batch
from dialogpt_ds.config.configuration import Configuration, resolve
from dialogpt_ds.config.schedule import Schedule
from dialogpt_ds.config.sources import NamedSource
from dialogpt_ds.distributed.world import World
from dialogpt_ds.errors import Problems
from dialogpt_ds.model.attention import check_attention
from dialogpt_ds.model.load import ModelSource, check_init_checkpoint, find_model
from dialogpt_ds.order.batches import RankSlice
from dialogpt_ds.order.mixture import Mixture, MixtureKey
from dialogpt_ds.order.position import OrderKey
from dialogpt_ds.order.windows import BLOCKS_PER_WINDOW
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.training.data_checks import OpenedData, check_model_tokenizer, check_row_length, open_data

OF_ONE_START = (
    "resume", "continue_from", "changed_order", "local_rank", "print_config", "plot_schedule", "dry_run", "gpu", "link",
)  # fmt: skip
"""Arguments that belong to one start of a run, and not to the run."""


@dataclass(frozen=True, kw_only=True)
class Settings(Configuration):
    """A run as it will be: nothing in it is a default any more."""

    world: World
    batch: BatchSizes
    model: ModelSource
    sources: list[NamedSource]
    """What is trained on, with weights."""
    directories: list[ShardDirectory]
    """The same, opened."""
    evaluation: ShardDirectory | None
    tokenizer: Any
    """That of all of them."""

    @property
    def train(self) -> ShardDirectory:
        """The first shard directory that is trained on."""
        return self.directories[0]

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.arguments.max_seq_length

    @property
    def turn_ids(self) -> bool:
        """Whether each token's turn number is fed as its token type."""
        return not self.arguments.no_token_id

    @property
    def save_step(self) -> int:
        """Optimizer steps between checkpoints."""
        assert self.arguments.save_step is not None, "resolved"
        return self.arguments.save_step

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.arguments.output_dir).expanduser()

    @property
    def log_dir(self) -> Path:
        """Folder of the logs."""
        return Path(self.arguments.log_dir)

    @property
    def schedule(self) -> Schedule:
        """Of the learning rate."""
        a = self.arguments
        return Schedule(
            a.lr_schedule, a.learning_rate, a.warmup_steps, a.warmup_proportion, a.num_optim_steps, self.model.width
        )

    @property
    def order_key(self) -> MixtureKey:
        """What the order of rows is a function of."""
        keys = [
            order_key(directory, self.arguments.seed, self.row_length, self.arguments.packing)
            for directory in self.directories
        ]
        return MixtureKey(tuple(keys), tuple(source.weight for source in self.sources))

    def evaluation_key(self, directory: ShardDirectory) -> OrderKey:
        """What the order of the evaluation's rows is a function of: the same in every run, packed where training is."""
        return order_key(directory, 0, self.row_length, self.arguments.packing)

    @property
    def share(self) -> RankSlice:
        """This rank's share of a global batch."""
        return RankSlice(self.world.rank, self.world.size, self.batch.micro, self.batch.accumulation)

    @property
    def sample_prompts(self) -> list[str]:
        """Prompts to answer at every evaluation; none where turn numbers are fed, which no generation here goes on
        with."""
        return [] if self.turn_ids else [prompt for prompt in self.arguments.sample_prompts if prompt.strip()]

    def layout(self) -> dict[str, Any]:
        """Return what decides on how a checkpoint's state is laid out over processes and files."""
        zero = self.deepspeed.get("zero_optimization", {})
        return {
            "processes": self.world.size,
            "ZeRO stage": self.zero_stage,
            "precision": self.precision,
            "optimizer state on": self.offload[0],
            "sub_group_size": zero.get("sub_group_size") if self.zero_stage == 3 else None,
            "round_robin_gradients": bool(zero.get("round_robin_gradients")) and self.zero_stage in (1, 2),
        }

    def what_runs(self) -> dict[str, Any]:
        """Return the content of run_config.yaml: every argument as it holds, so that `--config run_config.yaml` repeats
        the run."""
        return {name: value for name, value in asdict(self.arguments).items() if name not in OF_ONE_START}


def order_key(directory: ShardDirectory, seed: int, row_length: int, packing: bool) -> OrderKey:
    """Return the key of the order of a shard directory's rows."""
    return OrderKey(directory.manifest.fingerprint, seed, row_length, BLOCKS_PER_WINDOW, packing)


def prepare(parsed: Parsed[TrainingArguments], world: World) -> Settings:
    """Check everything and fill in every default.

    Raises:
        UserError: all problems that were found; what depends on something that is wrong itself was not looked at.
    """
    problems = Problems(argument_problems(parsed.arguments))
    numbers_are_sound = not problems.found
    configuration = problems.of(resolve, parsed)
    batch = data = model = None
    if numbers_are_sound and configuration is not None:
        arguments = configuration.arguments
        rows, accumulation = arguments.train_batch_size, arguments.gradient_accumulation_steps
        batch = problems.of(resolve_batch, rows, accumulation, parsed.explicit, configuration.deepspeed, world.size)
        problems.of(check_attention, arguments.attention, configuration.precision, arguments.dropout)
    if numbers_are_sound:
        data = problems.of(open_data, parsed.arguments, "max_seq_length" in parsed.explicit)
    if data is not None:
        model = problems.of(_model_for, parsed.arguments, data)
    if configuration is None or batch is None or data is None or model is None:
        problems.raise_all()
        raise AssertionError("what is missing has said why")
    problems.of(check_row_length, data.row_length, model, data.directories, data.evaluation)
    settings = Settings(
        arguments=replace(
            configuration.arguments,
            max_seq_length=data.row_length,
            train_batch_size=batch.micro * batch.accumulation,
            gradient_accumulation_steps=batch.accumulation,
        ),
        deepspeed=configuration.deepspeed | batch.keys(),
        precision=configuration.precision,
        notes=configuration.notes,
        world=world,
        batch=batch,
        model=model,
        sources=data.sources,
        directories=data.directories,
        evaluation=data.evaluation,
        tokenizer=data.tokenizer,
    )
    problems.of(_check_size, settings)
    problems.raise_all()
    return settings


def _model_for(arguments: TrainingArguments, data: OpenedData) -> ModelSource:
    """Find the model, and check that it fits the data's tokenizer; raises UserError."""
    manifest = data.directories[0].manifest
    model = find_model(
        arguments.model_name_or_path, arguments.dropout, manifest.eos_id, manifest.vocab_size, arguments.attention
    )
    if arguments.init_checkpoint:
        check_init_checkpoint(arguments.init_checkpoint, model)
    check_model_tokenizer(model, data.directories[0])
    return model


def _check_size(settings: Settings) -> None:
    """Refuse a batch of more rows than the data has; raises UserError."""
    directories = settings.directories
    Mixture(directories, settings.order_key, [()] * len(directories)).check_size(
        settings.batch.train, "--train_input_file"
    )

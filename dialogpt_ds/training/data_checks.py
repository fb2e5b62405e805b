"""The data of a run, and whether it fits: shards to each other, to the model, to the row length, to the cache."""

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.config.sources import NamedSource, parse_sources
from dialogpt_ds.conversations.inputs import open_evaluation
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.model.load import ModelSource
from dialogpt_ds.model.pkl import is_pkl
from dialogpt_ds.order.windows import SHARDS_PER_GROUP
from dialogpt_ds.preprocessing.arguments import ShardArguments
from dialogpt_ds.preprocessing.make import write_shards
from dialogpt_ds.shards.cache import CacheSettings
from dialogpt_ds.shards.manifest import TOKENIZER
from dialogpt_ds.shards.reader import ShardDirectory
from dialogpt_ds.tokenization import GPT2_VOCABULARY_SIZE, find_tokenizer, vocabulary_sha256


class OpenedData(NamedTuple):
    """What a run trains and evaluates on, opened."""

    sources: list[NamedSource]
    """What is trained on, with weights."""
    directories: list[ShardDirectory]
    """The same, opened."""
    evaluation: ShardDirectory | None
    tokenizer: Any
    """That of all of them."""
    row_length: int
    """Tokens of a row."""


def open_data(arguments: TrainingArguments, length_is_explicit: bool) -> OpenedData:
    """Open all shard directories, and check that they fit each other and the cache.

    Args:
        arguments: of the command line.
        length_is_explicit: whether --max_seq_length was given; else the shards' own limit holds.

    Raises:
        UserError: one can't be opened, or doesn't fit.
    """
    sources = parse_sources(arguments.train_input_file, "--train_input_file")
    cache = CacheSettings(Path(arguments.cache_dir).expanduser(), int(arguments.cache_gb * 1e9))
    directories = [ShardDirectory.open(source.path, "--train_input_file", cache) for source in sources]
    check_sources(directories)
    longest = max(directory.manifest.max_seq_length for directory in directories)
    row_length = arguments.max_seq_length if length_is_explicit else longest
    evaluation = None if arguments.skip_eval else open_evaluation_data(arguments, directories[0], row_length, cache)
    check_cache([*directories, *([evaluation] if evaluation else [])], cache)
    if evaluation is not None:
        check_same_tokenizer(evaluation, "--eval_input_file", directories[0])
    return OpenedData(sources, directories, evaluation, shards_tokenizer(directories[0]), row_length)


def check_sources(directories: list[ShardDirectory]) -> None:
    """Refuse a mixture of one content twice, or of different tokenizers; raises UserError."""
    for number, directory in enumerate(directories[1:], start=1):
        check_same_tokenizer(directory, "--train_input_file", directories[0])
        for other in directories[:number]:
            if other.manifest.fingerprint == directory.manifest.fingerprint:
                raise UserError(
                    f"--train_input_file: {other.name!r} and {directory.name!r} hold the same shards; name one, with "
                    "the sum of the weights"
                )


def check_cache(directories: list[ShardDirectory], cache: CacheSettings) -> None:
    """Refuse a cache too small for what is in use at one time; raises UserError."""
    needed = sum(d.largest_shards(2 * SHARDS_PER_GROUP) for d in directories if d.cache is not None)
    if needed > cache.max_bytes:
        raise UserError(
            f"--cache_gb {cache.max_bytes / 1e9:g} is too small for the remote shards in use at one time: the two "
            f"groups of {SHARDS_PER_GROUP} shards of each directory that are read and fetched ahead have "
            f"{needed / 1e9:.3g} GB; give that or more"
        )


def open_evaluation_data(
    arguments: TrainingArguments, train: ShardDirectory, row_length: int, cache: CacheSettings
) -> ShardDirectory:
    """Open the evaluation's shard directory; of a TSV, every rank makes the same one in a temporary folder of its own.

    Raises:
        UserError: it can't be opened or read.
    """
    path = arguments.eval_input_file
    if not Path(path).expanduser().is_file():
        return ShardDirectory.open(path, "--eval_input_file", cache)
    folder = tempfile.mkdtemp(prefix="dialogpt-evaluation-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    own = train.folder / TOKENIZER
    shard_arguments = ShardArguments(
        output=str(Path(folder, "shards")),
        tokenizer=str(own) if own.is_dir() else train.manifest.tokenizer["name"],
        max_seq_length=row_length,
        workers=1,
    )
    try:
        write_shards(shard_arguments, [open_evaluation(path, arguments.normalize_data)], say=lambda _: None)
    except RunError as error:
        raise UserError(f"--eval_input_file {path!r}: {error}") from error
    return ShardDirectory.open(shard_arguments.output, "--eval_input_file")


def shards_tokenizer(train: ShardDirectory) -> Any:
    """Return the tokenizer the shards were made with: from their own folder, else by name; raises UserError."""
    manifest = train.manifest
    folder = train.folder / TOKENIZER
    tokenizer = find_tokenizer(str(folder) if folder.is_dir() else manifest.tokenizer["name"])
    found = vocabulary_sha256(tokenizer)
    if found != manifest.tokenizer["sha256"]:
        where = str(folder) if folder.is_dir() else manifest.tokenizer["name"]
        raise UserError(
            f"tokenizer {where!r} is not the one that {train.folder} was made with: its vocabulary has sha256 "
            f"{found[:12]}, the manifest says {manifest.tokenizer['sha256'][:12]}. Put the right tokenizer there, or "
            "make the shards again."
        )
    return tokenizer


def check_model_tokenizer(model: ModelSource, train: ShardDirectory) -> None:
    """Refuse a loaded model whose tokenizer differs from the shards'; a folder without one says nothing, a .pkl has
    GPT-2's."""
    if model.weights is None:
        return
    if is_pkl(model.weights):
        if model.config.vocab_size != GPT2_VOCABULARY_SIZE:
            return  # trained with another tokenizer, which the file does not tell
        tokenizer = "gpt2"
    elif any((Path(model.weights) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = model.weights
    else:
        return
    found = vocabulary_sha256(find_tokenizer(tokenizer))
    expected = train.manifest.tokenizer
    if found != expected["sha256"]:
        raise UserError(
            f"--model {model.name!r} has a tokenizer with sha256 {found[:12]}, the shards in {train.folder} were made "
            f"with {expected['name']!r}, sha256 {expected['sha256'][:12]}: make the shards again with --tokenizer "
            f"{tokenizer}"
        )


def check_same_tokenizer(directory: ShardDirectory, what: str, train: ShardDirectory) -> None:
    """Refuse a shard directory (named by the option `what`) made with another tokenizer than `train`; raises
    UserError."""
    mine, theirs = directory.manifest.tokenizer, train.manifest.tokenizer
    if mine["sha256"] != theirs["sha256"] or directory.manifest.eos_id != train.manifest.eos_id:
        raise UserError(
            f"{what} {directory.name!r} was made with tokenizer {mine['name']!r} (sha256 {mine['sha256'][:12]}), "
            f"--train_input_file {train.name!r} with {theirs['name']!r} ({theirs['sha256'][:12]}): make both with one "
            "tokenizer"
        )


def check_row_length(
    row_length: int, model: ModelSource, directories: list[ShardDirectory], evaluation: ShardDirectory | None
) -> None:
    """Refuse rows that are longer than the model's positions, or shorter than what shards were made with; raises
    UserError."""
    limit = model.max_positions
    made = max(directory.manifest.max_seq_length for directory in directories)
    if limit is not None and row_length > limit:
        raise UserError(
            f"--max_seq_length {row_length} is more than the {limit} positions of model {model.name!r}: give at most "
            f"{limit}" + (f", and make shards of at most {limit}" if made > limit else "")
        )
    named = [(directory, "--train_input_file") for directory in directories]
    for directory, name in [*named, *([(evaluation, "--eval_input_file")] if evaluation else [])]:
        if row_length < directory.manifest.max_seq_length:
            made = directory.manifest.max_seq_length
            raise UserError(
                f"--max_seq_length {row_length} is below the limit of {made} tokens that {name} {directory.name!r} was "
                f"made with, so its longest examples would not fit: give {made} or more, or make shards with "
                f"--max_seq_length {row_length}"
            )

"""Making a shard directory from conversations, on any number of processes, with the same bytes."""

import collections
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from dialogpt_ds.commandline import make_folder, option
from dialogpt_ds.conversations.conversation import Record
from dialogpt_ds.conversations.inputs import FormatName, Input, TurnWeights, open_inputs
from dialogpt_ds.conversations.targets import Targets
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.shards.blocks import smallest_dtype
from dialogpt_ds.shards.encoding import TRAIN, VALIDATION, Encoded, RecordEncoder, Reject
from dialogpt_ds.shards.manifest import INDEX, MANIFEST, TOKENIZER, Manifest
from dialogpt_ds.shards.report import REJECTS, REPORT, Balance, write_report
from dialogpt_ds.shards.writer import ShardWriter, make_manifest
from dialogpt_ds.tokenization import find_tokenizer, make_encoder, vocabulary_sha256

CHUNK_RECORDS = 512
"""Records that travel to a worker at once: some milliseconds of work."""


@dataclass
class ShardArguments:
    """Turn conversations into tokenised WebDataset shards."""

    input: list[str] = option([])
    """Files with conversations (.gz, .bz2 and .xz too). Not needed for --format chitchat, which has its own."""
    format: FormatName = "auto"
    """dialogpt (weighted or plain TSV), chitchat (the PyPI package chitchat-dataset), or auto."""
    output: str = ""
    """Folder for the shards; with --validation_fraction it gets the folders train and validation."""
    tokenizer: str = "gpt2"
    """gpt2, a local folder with a tokenizer, or a hub id."""
    max_seq_length: int = 128
    """No example is longer than this many tokens."""
    validation_fraction: float = 0.0
    """Share of the conversations, chosen by a hash of their text, that goes to the folder validation."""
    targets: Targets = "input"
    """Which turns are learned: as the input says (else its format's default), all but the first, or the last."""
    turn_weights: TurnWeights = "auto"
    """Whether the turns of a DialoGPT TSV begin with a weight; auto decides it from the head of each file and says so."""
    max_reject_fraction: float = 0.01
    """Above this share of rejected records the run fails and writes no manifest."""
    workers: int = os.cpu_count() or 1
    """Processes that encode. The output does not depend on it."""
    shard_megabytes: int = 256
    """Size of a shard (1 MB = 2**20 bytes)."""


def check_arguments(arguments: ShardArguments) -> None:
    """Check everything that can be checked before any work; raises UserError with all problems at once."""
    problems = []
    if not arguments.output:
        problems.append("--output is missing: name a folder for the shards")
    if arguments.max_seq_length < 2:
        problems.append(f"--max_seq_length {arguments.max_seq_length} is too small: a target needs one token before it, so 2")
    if not 0 <= arguments.validation_fraction < 1:
        problems.append(f"--validation_fraction {arguments.validation_fraction} is not a share: give 0 to below 1")
    if not 0 <= arguments.max_reject_fraction <= 1:
        problems.append(f"--max_reject_fraction {arguments.max_reject_fraction} is not a share: give 0 to 1")
    if arguments.workers < 1 or arguments.shard_megabytes < 1:
        problems.append(f"--workers {arguments.workers} and --shard_megabytes {arguments.shard_megabytes} must be 1 or more")
    if problems:
        raise UserError("\n".join(problems))


def make_shards(arguments: ShardArguments, say: Callable[[str], None] = print) -> dict[str, Manifest]:
    """Write the shard directories and return their manifests by split.

    Raises:
        UserError: wrong options or inputs, or the output already holds finished shards.
        RunError: more rejects than allowed, or nothing to write.
    """
    check_arguments(arguments)
    return write_shards(arguments, open_inputs(arguments.input, arguments.format, arguments.turn_weights), say)


def write_shards(arguments: ShardArguments, inputs: list[Input], say: Callable[[str], None]) -> dict[str, Manifest]:
    """Write the shard directories of inputs that are open already; raises as `make_shards` does."""
    started = time.monotonic()
    output = Path(arguments.output).expanduser()
    folders = {TRAIN: output / TRAIN, VALIDATION: output / VALIDATION} if arguments.validation_fraction else {TRAIN: output}
    for folder in {output, *folders.values()}:
        make_folder(folder, "--output")
        _clear_unfinished(folder, say)
    tokenizer = find_tokenizer(arguments.tokenizer)
    for source in inputs:
        say(source.describe())
    encoder = RecordEncoder(
        encode=make_encoder(tokenizer),
        eos_id=tokenizer.eos_token_id,
        token_dtype=smallest_dtype(len(tokenizer)),
        max_seq_length=arguments.max_seq_length,
        targets=arguments.targets,
        validation_fraction=arguments.validation_fraction,
    )
    writers = {split: ShardWriter(folder, arguments.shard_megabytes << 20) for split, folder in folders.items()}
    balances = {split: Balance() for split in folders}
    _write_all(_encode_all(inputs, encoder, arguments.workers), writers, balances, output)
    _finish_balances(arguments, output, folders, balances, started, say)
    manifests = {}
    for split, writer in writers.items():
        manifests[split] = _write_manifest(arguments, tokenizer, writer, split)
        say(f"wrote {folders[split]}: fingerprint {manifests[split].fingerprint[:12]}")
    return manifests


def _clear_unfinished(folder: Path, say: Callable[[str], None]) -> None:
    """Refuse a folder with finished shards; remove what an interrupted run has left."""
    if (folder / MANIFEST).exists():
        raise UserError(f"--output {folder} already holds finished shards; name another folder, or delete it first")
    names = [*folder.glob("shard-*.tar"), *(folder / name for name in (INDEX, REPORT, REJECTS))]
    leftovers = [path for path in names if path.exists()]
    for path in leftovers:
        path.unlink()
    if leftovers:
        say(f"{folder}: removed {len(leftovers)} files of an unfinished run")


def _chunks(inputs: list[Input]) -> Iterator[tuple[Input, list[Record]]]:
    for source in inputs:
        chunk: list[Record] = []
        for record in source.records():
            chunk.append(record)
            if len(chunk) == CHUNK_RECORDS:
                yield source, chunk
                chunk = []
        if chunk:
            yield source, chunk


_encoder: RecordEncoder | None = None
"""Set before worker processes are forked, which inherit it: an encoder can't be pickled, and takes a second to build."""


def _encode_chunk(source: Input, records: list[Record]) -> dict[str, Encoded]:
    assert _encoder is not None
    return _encoder(source, records)


def _encode_all(inputs: list[Input], encoder: RecordEncoder, workers: int) -> Iterator[dict[str, Encoded]]:
    """Yield what each chunk became, in the order of the input."""
    if workers == 1:
        for source, records in _chunks(inputs):
            yield encoder(source, records)
        return
    global _encoder
    _encoder = encoder
    waiting: collections.deque[Future[dict[str, Encoded]]] = collections.deque()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for source, records in _chunks(inputs):
            waiting.append(pool.submit(_encode_chunk, source, records))
            # A bounded queue: memory does not grow with the input, whichever side is slower.
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _write_all(
    chunks: Iterable[dict[str, Encoded]], writers: dict[str, ShardWriter], balances: dict[str, Balance], output: Path
) -> None:
    rejects: IO[str] | None = None
    try:
        for chunk in tqdm(chunks, unit=" chunks", desc="encoding", disable=not sys.stderr.isatty()):
            for split, writer in writers.items():
                encoded = chunk[split]
                writer.add(encoded.block)
                balances[split].add(encoded.balance)
                if encoded.rejects and rejects is None:
                    rejects = open(output / REJECTS, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
                for reject in encoded.rejects:
                    assert rejects is not None
                    rejects.write(_reject_line(reject))
    finally:
        if rejects is not None:
            rejects.close()


def _reject_line(reject: Reject) -> str:
    return json.dumps(reject._asdict(), ensure_ascii=False) + "\n"


def _finish_balances(
    arguments: ShardArguments,
    output: Path,
    folders: dict[str, Path],
    balances: dict[str, Balance],
    started: float,
    say: Callable[[str], None],
) -> None:
    """Print the balance, write the reports, and stop where the result must not be used."""
    whole = Balance()
    for balance in balances.values():
        balance.check()
        whole.add(balance)
    for line in whole.lines():
        say(line)
    usage = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    parts = {**{folders[split]: balance for split, balance in balances.items()}, output: whole}
    for folder, balance in parts.items():
        write_report(folder, balance.to_json(time.monotonic() - started, usage * 1024))
    rejected = whole.rejects.total()
    if whole.records and rejected / whole.records > arguments.max_reject_fraction:
        raise RunError(
            f"{rejected:,} of {whole.records:,} records were rejected, more than --max_reject_fraction "
            f"{arguments.max_reject_fraction}; see {output / REJECTS}. No manifest was written."
        )
    for split, balance in balances.items():
        if not balance.examples:
            raise RunError(
                f"the {split} part has no example: {balance.conversations:,} of {whole.conversations:,} conversations came to it, "
                f"{balance.without_target:,} of them without a turn to learn. See --targets and --validation_fraction. "
                "No manifest was written."
            )


def _write_manifest(arguments: ShardArguments, tokenizer: Any, writer: ShardWriter, split: str) -> Manifest:
    index = writer.finish()
    tokenizer.save_pretrained(str(writer.folder / TOKENIZER))
    facts = {
        "name": Path(arguments.tokenizer).name if Path(arguments.tokenizer).is_dir() else arguments.tokenizer,
        "sha256": vocabulary_sha256(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
        "max_seq_length": arguments.max_seq_length,
    }
    options: dict[str, Any] = {"targets": arguments.targets, "reverse": False, "two_turn": False}
    if arguments.validation_fraction:
        options |= {"validation_fraction": arguments.validation_fraction, "split": split}
    manifest = make_manifest(writer, index, facts, options)
    manifest.write(writer.folder)
    return manifest

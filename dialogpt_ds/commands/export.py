"""The command that exports a checkpoint: launch/export.py and dialogpt-export."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dialogpt_ds.commandline import option, parse, run_command
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.export.target import check_target


@dataclass
class ExportArguments:
    """Write a checkpoint of any ZeRO stage as a Hugging Face folder; needs neither the data nor the processes it was
    trained with."""

    folders: list[str] = option([], positional=True)
    """The checkpoint (output_dir/checkpoints/step-00000100), or output_dir for its last one; and the folder to
    write."""
    dtype: Literal["trained", "fp32", "fp16", "bf16"] = "trained"
    """Type of the weights: the one that they were trained in, or another."""
    best: bool = False
    """Of an output_dir, export the checkpoint with the best evaluation instead of the last."""
    overwrite: bool = False
    """Replace a folder that exists."""


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return run_command(
        lambda: _export(parse(ExportArguments, "Export a checkpoint as a Hugging Face folder.", argv).arguments)
    )


def _export(arguments: ExportArguments) -> int:
    if len(arguments.folders) != 2:
        raise UserError(
            f"give two folders, CHECKPOINT and DIR; got {len(arguments.folders)}: {' '.join(arguments.folders)}"
        )
    source, target = Path(arguments.folders[0]).expanduser(), check_target(arguments.folders[1], arguments.overwrite)
    from dialogpt_ds.commandline import quiet_libraries

    quiet_libraries()
    from dialogpt_ds.checkpoints.folder import DamagedCheckpointError, Summary, difference
    from dialogpt_ds.checkpoints.universal import master_weights
    from dialogpt_ds.export.card import model_card
    from dialogpt_ds.export.folder import MODEL_FOLDER, write_export
    from dialogpt_ds.model.flops import DTYPES

    source = checkpoint_in(source, arguments.best)
    try:
        summary = Summary.read(source)
        problem = next((p for name, sums in summary.files.items() if (p := difference(source, name, sums))), None)
    except DamagedCheckpointError as error:
        problem = str(error)
    if problem is not None:
        raise UserError(f"checkpoint {source} is damaged: {problem}. Take another one.")
    dtype = DTYPES[summary.precision if arguments.dtype == "trained" else arguments.dtype]
    # Names are those of the model inside of the module that computes the loss. A tied head appears under two names.
    weights = {
        name.removeprefix("model."): tensor.to(dtype) for name, tensor in master_weights(source, summary).items()
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        weights = without_tied(weights, source / MODEL_FOLDER)
        warning = write_export(
            weights, None, source / MODEL_FOLDER, target, model_card(summary.run, summary.step), summary.step
        )
    except OSError as error:
        raise RunError(f"{target} can't be written: {error}") from error
    if warning:
        print(warning)
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(
        f"{target}: step {summary.step:,} of {source}, {parameters / 1e6:,.1f} M parameters in "
        f"{str(dtype).removeprefix('torch.')}"
    )
    return 0


def checkpoint_in(path: Path, best: bool) -> Path:
    """Return the checkpoint that a path names: itself, or the last or best of an output_dir; raises UserError."""
    from dialogpt_ds.checkpoints.folder import BEST, SUMMARY, CheckpointFolder

    if (path / SUMMARY).is_file():
        return path
    folder = CheckpointFolder(path)
    step = folder.pointer(BEST) if best else max(folder.steps(), default=None)
    if step is None:
        kind = "best checkpoint" if best else "checkpoint"
        raise UserError(
            f"{path} is no checkpoint (it has no {SUMMARY}), and no output_dir with a {kind} in {folder.root}"
        )
    return folder.path(step)


def without_tied(weights: dict[str, Any], description: Path) -> dict[str, Any]:
    """Return the weights without those that the model ties to others."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(description), local_files_only=True))
    return {name: weights[name] for name, _ in model.named_parameters() if name in weights}

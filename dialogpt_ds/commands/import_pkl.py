"""The command that makes a Hugging Face folder of DialoGPT's .pkl file: launch/import_pkl.py and
dialogpt-import-pkl."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dialogpt_ds.commandline import option, parse, run_command
from dialogpt_ds.errors import RunError, UserError
from dialogpt_ds.export.target import check_target


@dataclass
class ImportArguments:
    """Write the weights of a DialoGPT .pkl file as a Hugging Face folder, with config, tokenizer and model card."""

    files: list[str] = option([], positional=True)
    """The .pkl file, and the folder to write."""
    tokenizer: str = "gpt2"
    """Tokenizer that the model was trained with: a name, or a local folder."""
    dtype: Literal["stored", "fp32", "fp16", "bf16"] = "stored"
    """Type of the weights: the one in the file (fp16 in those that were released), or another."""
    overwrite: bool = False
    """Replace a folder that exists."""


def main(argv: list[str] | None = None) -> int:
    """Import; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return run_command(
        lambda: _import(parse(ImportArguments, "Make a Hugging Face folder of a DialoGPT .pkl file.", argv).arguments)
    )


def _import(arguments: ImportArguments) -> int:
    if len(arguments.files) != 2:
        raise UserError(
            f"give a .pkl file and a folder to write; got {len(arguments.files)}: {' '.join(arguments.files)}"
        )
    source, target = arguments.files[0], check_target(arguments.files[1], arguments.overwrite)
    from dialogpt_ds.commandline import quiet_libraries

    quiet_libraries()
    from dialogpt_ds.export.folder import write_description, write_export
    from dialogpt_ds.model.flops import DTYPES
    from dialogpt_ds.model.pkl import config_of, read_pkl, shape_of
    from dialogpt_ds.tokenization import find_tokenizer

    weights = read_pkl(source, "the file")
    shape, config = shape_of(weights, source, "the file"), config_of(weights, source, "the file")
    tokenizer = find_tokenizer(arguments.tokenizer)
    _check_tokenizer(tokenizer, arguments.tokenizer, shape.vocabulary)
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    dtype = _common_type(weights) if arguments.dtype == "stored" else DTYPES[arguments.dtype]
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    description = Path(tempfile.mkdtemp(prefix="dialogpt-import-"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_description(config, tokenizer, tokenizer.eos_token_id, shape.positions, description)
        warning = write_export(weights, None, description, target, _card(Path(source).name, str(shape)), step=0)
    except OSError as error:
        raise RunError(f"{target} can't be written: {error}") from error
    finally:
        shutil.rmtree(description, ignore_errors=True)
    if warning:
        print(warning)
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(
        f"{target}: {shape}, {parameters / 1e6:,.1f} M parameters in {str(dtype).removeprefix('torch.')}, from {source}"
    )
    print(f"to train from it: deepspeed --num_gpus 8 launch/train.py --model {target} ...")
    return 0


def _check_tokenizer(tokenizer: Any, name: str, vocabulary: int) -> None:
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"--tokenizer {name!r} has {len(tokenizer):,} token ids, the model's embedding {vocabulary:,}: name the "
            f"one it was trained with"
        )


def _common_type(weights: dict[str, Any]) -> Any:
    """Return the type that most numbers of a file are in; a norm that was kept in fp32 beside fp16 matrices does not
    decide."""
    numbers: dict[Any, int] = {}
    for tensor in weights.values():
        numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel()
    return max(numbers, key=lambda dtype: numbers[dtype])


def _card(file: str, shape: str) -> str:
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [conversational, dialogue]\n---\n\n"
        f"# {file}\n\nThe weights of {file}, {shape}, written as a Hugging Face folder by dialogpt-ds. "
        "Every turn of a conversation ends with the end-of-text token; the model goes on with the next turn.\n"
    )

"""Command lines and config files from typed dataclasses: one parser builder and one way to end for every command."""

import dataclasses
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from dialogpt_ds.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED, EXIT_USER_ERROR, RunError, UserError
from dialogpt_ds.redaction import without_secrets

Arguments = TypeVar("Arguments")
Say = Callable[[str], None]
"""Tells a person a line."""


@dataclasses.dataclass(frozen=True)
class Parsed(Generic[Arguments]):
    """A parsed command line."""

    arguments: Arguments
    """The dataclass with every value, defaults included."""
    explicit: frozenset[str]
    """Names that were given on the command line or in a config file, so that a default is never taken for a choice."""


def option(default: Any, *aliases: str, positional: bool = False, words: dict[str, str] | None = None) -> Any:
    """A dataclass field with aliases on the command line, e.g. `option("117M", "--model")`.

    Args:
        default: its value where none is given.
        aliases: other names.
        positional: it is given without its name.
        words: what stands for `{name}` in the docstring under the field.
    """
    metadata = {"aliases": aliases, "positional": positional, "words": words}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(ArgumentParser):
    """Reports a wrong command line as a UserError, so that every command ends in the same way."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"command line: {message}\nRun the command with --help to see every option.")


def build_parser(arguments_class: type, description: str, program: str | None = None) -> ArgumentParser:
    """Return a parser with one option per dataclass field; the docstring under a field is its help."""
    parser = _Parser(prog=program, description=description, print_config=None, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below.")
    bases = reversed(arguments_class.__mro__[:-1])
    helps = {p.arg_name: p.description for base in bases for p in parse_from_object(base).params}
    hints = get_type_hints(arguments_class)
    for field in dataclasses.fields(arguments_class):
        factory: Any = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        text = helps.get(field.name) or ""
        if field.metadata.get("words"):
            text = text.format(**field.metadata["words"])
        shared: dict[str, Any] = {"type": hints[field.name], "default": default, "help": text}
        if field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="+", help=text, type=str)
            continue
        names = [f"--{field.name}", *field.metadata.get("aliases", ())]
        if hints[field.name] is bool:
            shared |= {"nargs": "?", "const": True}
        elif hints[field.name] == list[str]:
            shared |= {"nargs": "+", "type": str}
        parser.add_argument(*names, **shared)
    return parser


def parse(
    arguments_class: type[Arguments], description: str, argv: list[str] | None = None, program: str | None = None
) -> Parsed[Arguments]:
    """Parse a command line into `arguments_class`.

    Raises:
        UserError: an unknown option or a value of the wrong type.
    """
    parser = build_parser(arguments_class, description, program)
    words = sys.argv[1:] if argv is None else argv
    try:
        given: Namespace = parser.parse_args(words, defaults=False)
        values: Namespace = parser.parse_args(words)
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises its own, argparse's and yaml's errors here
        raise UserError(f"command line: {error}") from error
    names = [field.name for field in dataclasses.fields(arguments_class)]  # type: ignore[arg-type]
    explicit = frozenset(name for name in names if name in given and given[name] is not None)
    return Parsed(arguments_class(**{name: values[name] for name in names}), explicit)


def run_command(work: Callable[[], int], is_first_rank: bool = True, grace_seconds: float = 20.0) -> int:
    """Run a command's work and turn what a person caused into a message and an exit code.

    Under a launcher, a rank that ends first takes the others down; so ranks other than the first wait up to
    `grace_seconds` before they speak, and the first rank's message is the one that a person reads.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except (UserError, RunError) as error:
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RUN_FAILED
        if not is_first_rank:
            # SIGTERM from the launcher ends the wait; it means that the first rank has spoken.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
            signal.sigtimedwait([], grace_seconds)
        kind = "error" if isinstance(error, UserError) else "run failed"
        print(f"{kind}: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        return code


def make_folder(folder: Path, what: str) -> None:
    """Make a folder for output, with its parents.

    Raises:
        UserError: it can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{what} {str(folder)!r} can't be made: {error.strerror}; name a folder that you may write to"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{what} {str(folder)!r} can't be written to; name a folder that you may write to")


def existing_folder(path: str, what: str) -> Path:
    """Return `path` as a folder that exists.

    Raises:
        UserError: it is missing or is a file.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"{what} {path!r} does not exist (looked in {folder.absolute().parent})")
    if not folder.is_dir():
        raise UserError(f"{what} {path!r} is a file, a folder is needed")
    return folder


def quiet_libraries() -> None:
    """Leave only the warnings that matter of what the libraries say; --verbose brings them back."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find the same, and warn about it
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("DeepSpeed", "transformers", "torch.distributed", "wandb", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")

"""The file with variables that DeepSpeed's launcher gives to every host (.deepspeed_env), and what in it would not
arrive."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dialogpt_ds.errors import UserError
from dialogpt_ds.redaction import SHORTEST, without_secrets

NAME_VARIABLE = "DS_ENV_FILE"
DEFAULT_NAME = ".deepspeed_env"
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Beginnings of the names of variables that it takes from its own environment (launcher/runner.py; NCCL on GPUs)."""
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PLAIN = re.compile(r"[\w@%+=:,./-]*")
"""Values that the launcher writes into its shell command as they are; others it puts into double quotes
(multinode_runner.py)."""


@dataclass(frozen=True)
class EnvironmentFile:
    """A file of variables as DeepSpeed's launcher reads it."""

    path: Path
    variables: dict[str, str]
    """Name and value of each line that is well formed."""
    problems: list[str]
    """Lines that stop the launcher, or that arrive as something else; without the values of secrets."""
    warnings: list[str]
    """Lines that work by luck."""
    secrets: list[str]
    """Names of variables whose values should not be in it: the launcher prints them, and every host lists them to all
    of its users."""

    @property
    def secrets_warning(self) -> str:
        """What a person should be told about the secrets; "" where there are none."""
        if not self.secrets:
            return ""
        return (
            f"{self.path} holds {', '.join(self.secrets)}, and the launcher prints its values in its log and in every "
            "host's list of processes: put secrets where each host reads them itself (~/.netrc for wandb, HF_HOME's "
            "token file for the hub), and remove the line"
        )


def secrets_warnings() -> list[str]:
    """Return a warning for each file of variables that gives secrets to all hosts."""
    found = []
    for path in find_environment_files():
        with contextlib.suppress(UserError):  # the launcher could not read it either, and would have ended
            found.append(read_environment_file(path).secrets_warning)
    return [warning for warning in found if warning]


def find_environment_files(environment: Mapping[str, str] | None = None, folder: Path | None = None) -> list[Path]:
    """Return the files that DeepSpeed's launcher would read, in its order: of the home folder, then of the one that it
    is started in.

    Args:
        environment: of the launcher; this process's by default. DS_ENV_FILE in it names another file than
            .deepspeed_env.
        folder: that the launcher is started in; the current one by default.
    """
    environment = os.environ if environment is None else environment
    name = environment.get(NAME_VARIABLE, DEFAULT_NAME)
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    places = [home / name, (folder or Path()).absolute() / name]
    return [place for place in dict.fromkeys(places) if place.is_file()]


def launcher_exports(environment: Mapping[str, str] | None = None, folder: Path | None = None) -> dict[str, str]:
    """Return the variables that DeepSpeed's launcher gives to the processes on all hosts, secrets and broken lines left
    out."""
    environment = os.environ if environment is None else environment
    folder = (folder or Path()).absolute()
    found = {name: value for name, value in environment.items() if name.startswith(EXPORTED)}
    found["PYTHONPATH"] = os.pathsep.join(
        [str(folder), *([environment["PYTHONPATH"]] if "PYTHONPATH" in environment else [])]
    )
    for path in find_environment_files(environment, folder):
        with contextlib.suppress(UserError):
            found |= read_environment_file(path).variables
    return {name: value.strip('"') for name, value in found.items() if not is_secret(name, value)}


def read_environment_file(path: Path) -> EnvironmentFile:
    """Read one file.

    Raises:
        UserError: it can't be read at all.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as a text file in UTF-8, and the launcher reads it: {error}") from error
    variables: dict[str, str] = {}
    problems: list[str] = []
    warnings: list[str] = []
    for number, line in enumerate(lines, start=1):
        place, text = f"{path}:{number}:", line.strip()
        broken = _broken(text)
        if broken:
            problems.append(f"{place} {broken}")
            continue
        name, value = (part.strip() for part in text.split("=", maxsplit=1))
        if name.startswith("export "):
            warnings.append(
                f"{place} the word export is not needed, and only a shell forgives it: write {name.split()[-1]}=..."
            )
            name = name.removeprefix("export ").strip()
        if not _IDENTIFIER.fullmatch(name):
            problems.append(
                f"{place} {name!r} is no name of a variable: write NAME=value, letters, digits and _ in the name"
            )
            continue
        if name in variables:
            warnings.append(f"{place} {name} stands in the file twice, and the last one holds: remove one of the two")
        variables[name] = value
        problems += [f"{place} {problem}" for problem in _value_problems(name, value)]
    return EnvironmentFile(
        path, variables, problems, warnings, [name for name in variables if is_secret(name, variables[name])]
    )


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable's value should be kept out of logs; a path or a short word is none."""
    bare = value.strip("\"'")
    if len(bare) < SHORTEST or os.path.exists(bare):
        return False
    shown = f"{name}={bare}"
    return without_secrets(shown) != shown or without_secrets({name: bare}) != {name: bare}


def _broken(text: str) -> str | None:
    """Say what is wrong with a line that is no NAME=value; the launcher dies of most of them with a traceback."""
    crash = "which crashes the launcher (ValueError: not enough values to unpack)"
    if not text:
        return f"an empty line, {crash}: remove it"
    if text.startswith("#"):
        if "=" in text:
            return (
                "a comment with a =: the launcher exports it, and the shell drops all that follows it in the "
                "command: remove the line"
            )
        return f"a comment, {crash}: remove the line"
    if "=" not in text:
        return f"{without_secrets(text)!r} has no =, {crash}: write NAME=value, or remove the line"
    return None


def _value_problems(name: str, value: str) -> Iterator[str]:
    shown = "(left out)" if is_secret(name, value) else value
    if len(value) > 1 and value[0] == value[-1] == "'":
        yield f"{name}={shown} keeps its quotes, as a part of the value: write it without them"
    elif '"' in value and not (
        value.count('"') == 2 and value[0] == value[-1] == '"' and _PLAIN.fullmatch(value[1:-1])
    ):
        yield (
            f"{name}={shown} does not arrive as it is written: the launcher puts it into double quotes once more, so "
            "they end too early. Write it without quotes"
        )
    elif "`" in value:
        yield f"{name}={shown} is run as a command by the shell on each host: write the value itself"

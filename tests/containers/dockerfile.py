"""What the Dockerfile and .dockerignore say, read as the builder reads them: stages, values of ARG and ENV, the build
context."""

import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path

from tests.conftest import ROOT

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a stage."""

    name: str
    """RUN, COPY, ..."""
    flags: tuple[str, ...]
    """Its options, `--from=python`, without the values of variables."""
    text: str
    """What follows, on one line, without the values of variables."""

    def words(self) -> list[str]:
        """Return the words of the exec form, `["bash", "-c"]`, or of the shell form."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)

    def option(self, name: str) -> list[dict[str, str]]:
        """Return each `--name=key=value,...` of the instruction; the value of `--name=value` has the key ""."""
        found = [flag.removeprefix(f"--{name}=") for flag in self.flags if flag.startswith(f"--{name}=")]
        return [dict(part.rpartition("=")[::2] for part in value.split(",")) for value in found]


@dataclasses.dataclass
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    """An image, or another stage's name; the values of variables filled in."""
    instructions: list[Instruction] = dataclasses.field(default_factory=list)

    def last(self, name: str) -> Instruction | None:
        """Return the last instruction of a name."""
        return next((one for one in reversed(self.instructions) if one.name == name), None)


class Dockerfile:
    """A Dockerfile's stages, in order, and the ARGs before the first."""

    def __init__(self, text: str) -> None:
        self.arguments: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}
        stage: Stage | None = None
        for instruction in _instructions(text):
            if instruction.name == "FROM":
                base, *named = instruction.text.split()
                name = named[1] if named else str(len(self.stages))
                stage = self.stages[name] = Stage(name, filled_in(base, self.arguments))
            elif stage is None:
                self.arguments |= assignments(instruction.text)
            else:
                stage.instructions.append(instruction)

    def lineage(self, name: str) -> list[Stage]:
        """Return a stage and those that it is made from, the first one first."""
        stage = self.stages[name]
        return [*(self.lineage(stage.base) if stage.base in self.stages else []), stage]

    def inherited(self, name: str, instruction: str) -> Instruction | None:
        """Return an image's USER, ENTRYPOINT, ...: the last one of the stage or of what it is made from."""
        found = [stage.last(instruction) for stage in self.lineage(name)]
        return next((one for one in reversed(found) if one is not None), None)

    def default(self, argument: str) -> str:
        """Return the value of an ARG that nobody gives another."""
        if argument in self.arguments:
            return self.arguments[argument]
        everything = [one for stage in self.stages.values() for one in stage.instructions if one.name == "ARG"]
        return next(value for one in everything for name, value in assignments(one.text).items() if name == argument)


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = []
    for line in re.sub(r"\\\s*\n", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        flags, rest = [], rest.strip()
        while match := re.match(r"(--\w+=\S+)\s+", rest):
            flags.append(match[1])
            rest = rest[match.end() :]
        found.append(Instruction(name, tuple(flags), rest))
    return found


def assignments(text: str) -> dict[str, str]:
    """Return the names and values of ENV, ARG or LABEL; an ARG without a value is left out."""
    return dict(word.split("=", 1) for word in shlex.split(text) if "=" in word)


def filled_in(text: str, values: dict[str, str]) -> str:
    """Return a text with the values of $NAME and ${NAME}; those that aren't known are empty, as in the builder."""
    return VARIABLE.sub(lambda match: values.get(match[1] or match[2], ""), text)


def ignored(path: str, patterns: str) -> bool:
    """Return whether .dockerignore leaves out a file: the last pattern that its path, or a folder above it, fits
    decides."""
    parts = path.split("/")
    above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    left_out = False
    for line in patterns.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if any(_pattern(pattern.lstrip("!")).fullmatch(one) for one in above):
            left_out = not pattern.startswith("!")
    return left_out


def _pattern(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay in a folder, a leading `**/` is any folders or none; a name without it is one at the top."""
    translated = re.escape(pattern.strip("/")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*")
    return re.compile(translated.replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))


def clone_files(root: Path = ROOT) -> list[str]:
    """Return the files that a fresh clone of this tree has, once what is new in it is committed."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(path for path in listed if path and (root / path).is_file())


def build_context(root: Path = ROOT) -> list[str]:
    """Return the files of a fresh clone that the builder is given."""
    patterns = (root / ".dockerignore").read_text(encoding="utf-8")
    return [path for path in clone_files(root) if not ignored(path, patterns)]
